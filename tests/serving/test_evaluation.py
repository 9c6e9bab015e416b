"""`atomic-moe eval`: perplexity as served equals what transformers computes on zeroed weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.checkpoints import write_profile, write_routing_profiles, zero_pruned
from tests.hub_cache import lay_out
from tests.quantized import quantize_checkpoint
from tests.serving.conftest import DEMO
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

COMMAND = [str(Path(sys.executable).parent / "atomic-moe"), "eval"]
LENGTH = 100


def load(model: Path):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def windows_of(text: str) -> torch.Tensor:
    ids = torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.inference_mode()
def log_probabilities(model: Path, text: str) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary at all tokens of windows but the last, float32."""
    return load(model)(windows_of(text)).logits[:, :-1].log_softmax(dim=-1).flatten(0, 1)


def perplexity(logprobs: torch.Tensor, text: str) -> float:
    """Perplexity without first tokens, which are not scored."""
    return math.exp(functional.nll_loss(logprobs, windows_of(text)[:, 1:].flatten()))


def divergence(dense: torch.Tensor, other: torch.Tensor, text: str) -> float:
    """Mean over tokens, the long way: the text's token and the likeliest 256 of both, by name."""
    total = 0.0
    for *pair, token in zip(dense, other, windows_of(text)[:, 1:].flatten().tolist(), strict=True):
        told = [{token, *it.topk(256).indices.tolist()} for it in pair]
        p, q = (it.double().exp().tolist() for it in pair)
        pairs = [(p[it], q[it]) for it in told[0] & told[1]]
        pairs.append((1 - sum(it for it, _ in pairs), 1 - sum(it for _, it in pairs)))
        total += sum(one * math.log(one / two) for one, two in pairs)
    return total / len(dense)


@torch.inference_mode()
def answers(model: Path, text: str) -> list[list[int]]:
    prompts = windows_of(text)[:, : LENGTH // 2]
    told = load(model).generate(
        prompts, max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(prompts)
    )
    return told[:, LENGTH // 2 :].tolist()


def test_rows_and_numbers(tmp_path):
    texts = {}
    arguments = []
    for domain in ("c", "english"):
        source = DEMO.parent / "data" / f"{domain}.heldout.txt"
        texts[domain] = source.read_text()[:3000]
        (tmp_path / f"{domain}.txt").write_text(texts[domain])
        arguments += ["--data", f"{tmp_path / domain}.txt:{domain}"]
    command = [*COMMAND, str(DEMO), *arguments, "--profile", "heapr-40", "--json"]
    command += ["--profile", "heapr-20"]  # in the same engine
    command += ["--seq-len", str(LENGTH), "--dtype", "float32"]
    command += ["--plot", str(tmp_path / "plots" / "perplexity.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dense, pruned, other = json.loads(done.stdout)

    masks, of_other = (
        PruningProfile.read(DEMO / "atomic_profiles" / f"{name}.safetensors")
        for name in ("heapr-40", "heapr-20")
    )
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    zero_pruned(DEMO, tmp_path / "other", of_other)
    assert (dense["profile"], pruned["profile"]) == ("dense", "heapr-40")
    assert (dense["method"], pruned["method"]) == ("dense", "heapr")
    for domain in ("all", *texts):
        change = pruned["perplexity"][domain] / dense["perplexity"][domain] - 1
        assert pruned["delta"][domain] == pytest.approx(change)
        assert dense["delta"][domain] == 0
    assert (tmp_path / "plots" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert pruned["kept_bytes"] == masks.kept_atoms * 3 * 128 * 4
    equal, count = 0, 0
    for domain, text in texts.items():
        models = (DEMO, tmp_path / "zeroed")
        of_dense, of_pruned = found = [log_probabilities(model, text) for model in models]
        for row, logprobs in zip((dense, pruned), found, strict=True):
            wanted = perplexity(logprobs, text)
            assert row["perplexity"][domain] == pytest.approx(wanted, rel=1e-3)
        wanted = perplexity(log_probabilities(tmp_path / "other", text), text)
        assert other["perplexity"][domain] == pytest.approx(wanted, rel=1e-3)
        whole = (of_dense.exp() * (of_dense - of_pruned)).sum(dim=1).mean().item()
        assert pruned["kl"][domain] == pytest.approx(divergence(*found, text), rel=1e-3)
        assert 0.85 * whole < pruned["kl"][domain] <= whole
        told = [answers(model, text) for model in models]
        equal += sum(one == two for one, two in zip(*told, strict=True))
        count += len(told[0])
    assert dense["kl"] == {domain: pytest.approx(0, abs=1e-9) for domain in dense["kl"]}
    assert dense["answers"] == {"prompts": count, "tokens": 32, "equal": 1.0, "common": 1.0}
    assert pruned["answers"]["equal"] == pytest.approx(equal / count, abs=1.5 / count)
    assert pruned["answers"]["equal"] < pruned["answers"]["common"] < 1
    assert dense["tokens"]["all"] == sum(dense["tokens"][domain] for domain in texts)


# H is 128, I is 64. Codes, and their scales: 16 bits or 8 for every 32 codes; or 32 for every atom
# of gate and up, and for every output of down.
ATOM_BYTES = {
    "int4": 3 * (128 // 2 + 2 * 128 // 32),
    "mxfp4": 3 * (128 // 2 + 128 // 32),
    "fp8-channel": 3 * 128 + 4 * (2 + 128 // 64),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(it, marks=[] if it == "int4" else pytest.mark.full) for it in ATOM_BYTES],
)
def test_quantized_checkpoints_beside_what_they_stand_for(tmp_path, name):
    """Dense too goes through the loader: not every CPU has a vLLM kernel for such experts."""
    make_model("qwen3_moe", tmp_path / "original")
    plain = quantize_checkpoint(tmp_path / "original", tmp_path / "model", name)
    (tmp_path / "t.txt").write_text(random_text(400))
    info = describe_checkpoint(plain)
    masks = write_profile(info, "half", tmp_path / "profiles", seed=1)
    file = tmp_path / "profiles" / "half.safetensors"
    lay_out(tmp_path / "hub", "org/profiles", "v1", {"folder/half.safetensors": file})
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = []
    # The same profiles, from a directory and from the Hub's cache.
    for model, profiles in (
        (tmp_path / "model", tmp_path / "profiles"),
        (plain, "org/profiles@v1/folder"),
    ):
        command = [*COMMAND, str(model), "--data", str(tmp_path / "t.txt"), "--json"]
        command += ["--profiles", str(profiles), "--seq-len", "100", "--dtype", "float32"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(json.loads(done.stdout))
    for ours, wanted in zip(*found, strict=True):
        assert ours["profile"] == wanted["profile"]
        assert ours["perplexity"]["all"] == pytest.approx(wanted["perplexity"]["all"], rel=1e-3)
    assert found[0][1]["kept_bytes"] == masks.kept_atoms * ATOM_BYTES[name]


@pytest.fixture
def in_process(monkeypatch):
    """The command sets them for its process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def test_refusals_come_before_the_engine(tmp_path, in_process):
    (tmp_path / "t.txt").write_text("word " * 600)
    # The first profile is good, the second has a good header only.
    shutil.copytree(DEMO / "atomic_profiles", tmp_path / "profiles")
    last = tmp_path / "profiles" / "heapr-40.safetensors"
    masks = PruningProfile.read(last)
    PruningProfile("heapr-40", {0: masks.keep[0]}, metadata=masks.metadata).write(last)
    for flags, words in (
        (["--profiles", str(tmp_path / "profiles")], "profile 'heapr-40': lacks layers [1, 2, 3]"),
        (["--profile", "none"], "profile 'none' is not in"),
        (
            ["--profiles", "org/none@v1"],
            "'org/none' is neither a directory nor on the Hugging Face",
        ),
        (["--data", f"{tmp_path / 't.txt'}:all"], "domain 'all' stands for all text together"),
        (["--seq-len", "512"], "sequence length 512: the model's context is 512"),
    ):
        command = ["eval", str(DEMO), "--data", str(tmp_path / "t.txt"), *flags]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert "[1/" not in done.stderr
        assert words in done.stderr.splitlines()[-1]


def test_code_runs_only_when_trusted(tmp_path, in_process):
    (tmp_path / "t.txt").write_text("word " * 600)
    shutil.copytree(DEMO, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    (tmp_path / "model" / "tokenizer.json").unlink()
    command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "t.txt")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].endswith("allow it with --trust-remote-code")
    trusted = CliRunner().invoke(app, [*command, "--trust-remote-code"])
    assert "no tokenizer can be read" in trusted.stderr, trusted.output


def served():
    """Results of an engine for one window of three tokens and one prompt."""
    from vllm_atomic_moe.measure.evaluation import Served
    from vllm_atomic_moe.measure.likeness import Predictions

    ids = torch.tensor([[5, 4], [6, 6]], dtype=torch.int32)
    told = Predictions(ids, torch.tensor([[-1.0, -0.5], [-2.0, -2.0]]))
    return Served({"t": [told]}, [[7, 8]], 2)


@pytest.mark.parametrize("part", ["engine", "picture"])
def test_what_fails_is_one_line(tmp_path, in_process, monkeypatch, part):
    """A failed engine ends the command; a failed plot does not, since the table took an hour."""
    from vllm_atomic_moe.measure import evaluation, plots

    (tmp_path / "t.txt").write_text("word " * 600)

    def fail(*_, **__):
        raise RuntimeError("no more")

    if part == "engine":
        monkeypatch.setattr(evaluation, "LLM", fail)
    else:
        monkeypatch.setattr(evaluation, "_serve", lambda *_, **__: (it() for it in [served]))
        monkeypatch.setattr(plots, "plot_perplexity", fail)
    command = ["eval", str(DEMO), "--data", str(tmp_path / "t.txt"), "--profile", "heapr-20"]
    done = CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "x.png")])
    last = done.stderr.splitlines()[-1]
    if part == "engine":
        assert done.exit_code == 1
        assert last.startswith("error: dense: vLLM fails (RuntimeError: no more)")
    else:
        assert done.exit_code == 0, done.output
        assert "heapr-20" in done.stdout
        assert last == f"warning: plot {tmp_path / 'x.png'} was not drawn (RuntimeError: no more)"


@pytest.mark.parametrize("as_json", [False, True])
def test_rows_measured_before_a_failure_are_kept(tmp_path, in_process, monkeypatch, as_json):
    from vllm_atomic_moe.measure import evaluation

    (tmp_path / "t.txt").write_text("word " * 600)

    def serve(directory, text, profiles, *_, **__):
        if profiles != [None]:  # The engine of dense names no profile.
            raise MemoryError("too large")
        yield served()

    monkeypatch.setattr(evaluation, "_serve", serve)
    command = ["eval", str(DEMO), "--data", str(tmp_path / "t.txt"), "--profile", "heapr-20"]
    command += ["--plot", str(tmp_path / "x.png"), *(["--json"] if as_json else [])]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    if as_json:
        assert [row["profile"] for row in json.loads(done.stdout)] == ["dense"]
    else:
        assert "dense" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: heapr-20: vLLM fails (MemoryError: too large)")
    assert (tmp_path / "x.png").exists()


def test_an_engine_that_does_not_start_costs_only_its_profiles(tmp_path, in_process, monkeypatch):
    """Profiles that mask routing have engines of their own, at most 16 in each; the rows keep the
    order of the command.
    """
    from vllm_atomic_moe.measure import evaluation

    (tmp_path / "t.txt").write_text("word " * 600)
    profiles = tmp_path / "profiles"
    shutil.copytree(DEMO / "atomic_profiles", profiles)
    write_routing_profiles(describe_checkpoint(DEMO), profiles)
    for number in range(16):
        profile = PruningProfile.read(profiles / "heapr-20.safetensors")
        replace(profile, name=f"copy-{number}").write_into(profiles)
    engines, fails = [], []

    def serve(directory, text, names, *_, **__):
        engines.append(names)
        for name in names:
            if name in fails:
                raise ValueError("no masks here")
            yield served()

    monkeypatch.setattr(evaluation, "_serve", serve)
    copies = [f"copy-{number}" for number in range(16)]
    chosen = ["whole", *copies, "ragged", "heapr-20"]
    command = ["eval", str(DEMO), "--profiles", str(profiles), "--data", str(tmp_path / "t.txt")]
    command += [part for name in chosen for part in ("--profile", name)]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert [row["profile"] for row in json.loads(done.stdout)] == ["dense", *chosen]
    assert engines == [[None], copies, ["heapr-20"], ["whole", "ragged"]]

    fails = ["whole"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert len(json.loads(done.stdout)) == 18
    assert done.stderr.splitlines()[-1].startswith("error: whole, ragged: no masks here")
    fails = ["copy-3"]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert len(json.loads(done.stdout)) == 4
    assert done.stderr.splitlines()[-1].startswith("error: copy-3: no masks here")


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_model_code_is_refused_at_once(tmp_path, in_process, command):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "t.txt").write_text("word " * 600)
    settings = tmp_path / "model" / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    more = ["--data", str(tmp_path / "t.txt")] if command == "eval" else []
    done = CliRunner().invoke(app, [command, str(tmp_path / "model"), *more])
    assert done.exit_code == 1
    assert "config.json runs code of its own ('own.Model')" in done.stderr.splitlines()[-1]


def test_servers_measured_before_a_failure_are_kept(monkeypatch):
    from vllm_atomic_moe.measure import server_benchmark
    from vllm_atomic_moe.measure.server_report import Latency, PhaseRun, ServerPlan, ServerRun

    plan = ServerPlan()
    latency = Latency(1.0, 1.0, 1.0)
    phases = tuple(
        PhaseRun(phase.name, 1.0, 1.0, 1.0, latency, latency)
        for phase in plan.phases
        for _ in range(plan.repeats)
    )

    def run(self, profile, number, report):
        if profile != "dense":
            raise ValueError("the server ended: too large")
        return ServerRun(profile, number, 1.0, 2.0, None, None, 10, 9, None, None, phases)

    monkeypatch.setattr(server_benchmark._Bench, "run", run)
    command = ["bench", str(DEMO), "--profile", "heapr-20", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert [row["profile"] for row in json.loads(done.stdout)["profiles"]] == ["dense"]
    assert done.stderr.splitlines()[-1] == "error: heapr-20: the server ended: too large"
