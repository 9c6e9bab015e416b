"""Requests of several profiles in one batch equal single requests, however vLLM runs the batch.

Every test has its own engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.serving.conftest import core, masked_transformers_logprobs, mixed_logprobs
from tests.serving.test_profiles_of_requests import (
    LONG,
    answers,
    bits,
    check_same,
    close,
    load,
    make_model,
    served,
    unchanged,
)
from vllm_atomic_moe.control.catalogue import Catalogue
from vllm_atomic_moe.engine.requests import Served
from vllm_atomic_moe.files.profiles import PruningProfile

PROMPTS = [[3, 9, 27] * 4, LONG[:20], [5, 6] * 20, LONG[:50]]
MIXED = ["narrow", "other", "whole", "dense"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model):
    """(prompt, profile) -> tokens and log-probabilities, each computed by itself."""
    with served(model, MIXED, enable_prefix_caching=False) as llm:
        found = {
            (index, name): answers(llm, [prompt], [name], 24)[0]
            for index, prompt in enumerate(PROMPTS)
            for name in MIXED
        }
    assert len({tuple(tokens) for tokens, *_ in found.values()}) > len(PROMPTS), "alike: blind"
    return found


def served_by_a_child(run, model, prologue="", **environment):
    """The result of one of the functions below, in its own process."""
    script = f"""
import json, sys
from pathlib import Path
from types import SimpleNamespace
{prologue}
from tests.serving import test_batches_of_profiles as tests
model = SimpleNamespace(directory=Path(sys.argv[2]))
print("ANSWERS", json.dumps(getattr(tests, sys.argv[1])(model)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, run.__name__, str(model.directory)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("ANSWERS "))


def test_drafts_chunks_and_preemption(model, alone):
    """In its own process: after numba no other engine starts there."""
    found, seen = served_by_a_child(serve_under_pressure, model)
    check_same(found, alone.values())
    assert min(seen.values()) > 0, seen


def serve_under_pressure(model):
    """The answers of one batch, and counts of the events that might mix them up."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt, schedule = Scheduler._preempt_request, Scheduler.schedule
    seen = {"preempted": 0, "drafts": 0, "chunks": 0}

    def count_preempted(self, *given, **more):
        seen["preempted"] += 1
        return preempt(self, *given, **more)

    def count_drafts_and_chunks(self, *given, **more):
        output = schedule(self, *given, **more)
        seen["drafts"] += len(output.scheduled_spec_decode_tokens)
        seen["chunks"] += sum(
            output.num_scheduled_tokens[new.req_id] < len(new.prompt_token_ids)
            for new in output.scheduled_new_reqs
            if not new.num_computed_tokens
        )
        return output

    Scheduler._preempt_request = count_preempted
    Scheduler.schedule = count_drafts_and_chunks
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with served(
        model,
        MIXED,
        max_model_len=128,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=12,
        block_size=32,
        speculative_config=drafts,
    ) as llm:
        return answers(llm, PROMPTS, MIXED, 24), seen


def test_asynchronous_scheduling(model, alone, monkeypatch):
    """GPUs run it; vLLM turns it off on CPUs."""
    force_asynchronous_scheduling(monkeypatch.setattr)
    with served(model, MIXED, async_scheduling=True, max_num_batched_tokens=64) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        check_same(answers(llm, PROMPTS, MIXED, 24), alone.values())


def force_asynchronous_scheduling(replace_attribute):
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config):
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    replace_attribute(CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config))


TRITON_HAS_A_CPU = """
import triton.backends
driver = SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
"""


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.full)])
def test_model_runner_v2(model, alone, asynchronous):
    """The default on GPUs, here in Triton's interpreter, which needs its own process."""
    run = serve_with_runner_v2_asynchronously if asynchronous else serve_with_runner_v2
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    found = served_by_a_child(run, model, TRITON_HAS_A_CPU, **environment)
    wanted = [alone[index, name] for index in range(len(PROMPTS)) for name in MIXED]
    check_same(found, [(tokens[:8], logprobs[:8], 0) for tokens, logprobs, _ in wanted])


def serve_with_runner_v2_asynchronously(model):
    force_asynchronous_scheduling(setattr)
    return serve_with_runner_v2(model, async_scheduling=True)


def serve_with_runner_v2(model, **options):
    with served(model, MIXED, max_num_batched_tokens=64, **options) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        assert not hasattr(runner, "_prepare_inputs"), "this is V1"
        scheduler_config = llm.llm_engine.vllm_config.scheduler_config
        assert scheduler_config.async_scheduling == bool(options)
        return answers(llm, PROMPTS, MIXED, 8)


def test_profiles_not_prepared_at_start_are_refused(model):
    """Atoms that are not resident, and a routing mask where none was listed."""
    narrow = model.profiles["narrow"]
    routable = {layer: mask.any(dim=1) for layer, mask in narrow.keep.items()}
    masking = PruningProfile("masking", narrow.keep, routable)
    fewer = {layer: mask.clone() for layer, mask in narrow.keep.items()}
    for mask in fewer.values():
        mask[:, ::2] = False
    within = PruningProfile("within", fewer)
    for profile in (masking, within):
        profile.write(model.files / f"{profile.name}.safetensors")
    try:
        with served(model, ["narrow"]) as llm:
            before, state = bits(llm), core(llm, "status")["served"]
            beyond = load(llm, model.profiles["other"])
            missing = sum(
                int((mask & ~narrow.keep[layer]).sum())
                for layer, mask in model.profiles["other"].keep.items()
            )
            assert f"'other' keeps {missing} atoms that are not in memory" in beyond["error"]
            refused = load(llm, masking)
            assert "excludes experts from routing and no profile listed at" in refused["error"]
            assert (beyond["kind"], refused["kind"]) == ("RankError", "RankError")
            assert core(llm, "status")["served"] == state
            assert unchanged(llm, before)
            listed = Catalogue(core(llm, "describe")).profiles(Served.of(state))
            servable = {entry["name"]: entry["servable"] for entry in listed}
            assert servable["within"]
            assert not servable["other"]
            assert load(llm, within)["ok"]
            found = mixed_logprobs(llm, ["narrow", "within"])
            for profile in (narrow, within):
                expected = masked_transformers_logprobs(model.directory, profile)
                assert close(found[profile.name], expected), profile.name
    finally:
        for profile in (masking, within):
            (model.files / f"{profile.name}.safetensors").unlink()
