"""The report of the server benchmark on the demo, with a plan too small for real figures."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import DEMO, ENVIRONMENT
from tests.quantized import quantize_checkpoint
from vllm_atomic_moe.cli.bench import _print_servers
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.measure import server_process
from vllm_atomic_moe.measure.server_benchmark import measure_servers
from vllm_atomic_moe.measure.server_report import Phase, ServerPlan

pytestmark = pytest.mark.full

PLAN = ServerPlan(
    phases=(
        Phase("prefill", input_tokens=64, output_tokens=1, concurrency=2, requests=4),
        Phase("decode", input_tokens=8, output_tokens=8, concurrency=2, requests=4),
    ),
    warmups=1,
    changes=3,
)
NAMES = ["heapr-20", "heapr-40"]
DENSE_BYTES = 4 * 16 * 3 * 128 * 128 * 2


@pytest.fixture(scope="module")
def measured():
    """The report, the progress, and the process groups that were started."""
    groups, said = [], []
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.delenv("VLLM_PLUGINS", raising=False)
        end_group = server_process.end_group

        def remember(process):
            groups.append(process.pid)
            end_group(process)

        patch.setattr(server_process, "end_group", remember)
        report = measure_servers(
            DEMO,
            DEMO / "atomic_profiles",
            names=NAMES,
            plan=PLAN,
            serve_arguments=["--enforce-eager"],
            progress=lambda *step: said.append(step),
        )
    return report, said, groups


def test_every_server_and_phase_is_measured(measured):
    report, said, _ = measured
    names = ["dense", *NAMES]
    assert [(run.profile, run.round) for run in report.runs] == [(name, 0) for name in names]
    assert [row.profile for row in report.profiles] == names
    for row in report.profiles:
        assert [phase.phase for phase in row.phases] == ["prefill", "decode"]
        prefill, decode = row.phases
        assert prefill.tpot_ms is None
        assert decode.tpot_ms.lowest > 0
        assert all(phase.ratio > 0 and phase.ttft_ms.median > 0 for phase in row.phases)
        per_request = decode.output_tokens_per_s.median / decode.requests_per_s.median
        assert per_request == pytest.approx(8)
        assert row.start_s.median > row.load_s.median
    assert [done for done, _, _ in said] == list(range(11))
    assert said[-1] == (10, 10, "")


def test_dense_is_the_reference(measured):
    dense = measured[0].profiles[0]
    assert (dense.kept, dense.bound, dense.kv_tokens_gained) == (1, 1, 0)
    assert (dense.load_ratio, dense.freed) == (1, None)
    assert [phase.ratio for phase in dense.phases] == [1, 1]


def test_memory_figures(measured):
    dense, _, pruned = measured[0].profiles
    kept = PruningProfile.read(DEMO / "atomic_profiles/heapr-40.safetensors").kept
    assert dense.resident_bytes == DENSE_BYTES
    assert pruned.kept == kept
    assert pruned.resident_bytes == pytest.approx(kept * DENSE_BYTES, rel=0.02)
    for row in measured[0].profiles:
        # One GiB of k and v of four layers, two heads of 32 in bf16, as the environment says.
        assert row.kv_gib == 1.0
        assert row.kv_tokens == 2**30 // (4 * 2 * 2 * 32 * 2)
        assert row.peak_bytes >= row.rest_bytes > 2**27
    assert pruned.kv_tokens_gained == 0


def test_changes_are_measured(measured):
    changes = measured[0].changes
    assert changes.profiles == tuple(NAMES)
    # Both hold every atom that either keeps, and heapr-40's are among heapr-20's.
    assert changes.resident_bytes == measured[0].profiles[1].resident_bytes
    assert changes.change_ms.highest >= changes.change_ms.lowest > 0


def test_table(measured, capsys):
    _print_servers(measured[0])
    printed = capsys.readouterr().out.split("\n\n")
    names = ["dense", *NAMES]
    assert [line.split()[0] for line in printed[0].splitlines()] == ["profile", *names]
    assert [line.split()[:2] for line in printed[1].splitlines()[1:]] == [
        [phase, name] for phase in ("prefill", "decode") for name in names
    ]
    assert printed[2].startswith("change of the active profile, 2 loaded, ")


def test_report_is_json(measured):
    report = measured[0]
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["plan"]["phases"][0]["name"] == "prefill"
    assert read["profiles"][1]["phases"][1]["ratio"] == report.profiles[1].phases[1].ratio


def test_the_servers_are_gone(measured):
    groups = measured[2]
    assert len(set(groups)) == 4
    assert not any(server_process.processes_of_group(group) for group in groups)


# Bits of a weight, and of scales for each: H and I are 128. And what stays beyond the kept part, of
# all bytes: 2 % of that part; or the scales of nearly every group of 32 atoms, 2.35 and 1.72 %.
@pytest.mark.parametrize(
    ("kind", "bits", "more"),
    [
        ("fp8-channel", 8 + 32 / 128, 0.6 * 0.02),
        ("int4", 4 + 16 / 32, 0.024),
        ("mxfp4", 4 + 8 / 32, 0.018),
    ],
)
def test_quantized_models_are_dense_through_the_loader(tmp_path, monkeypatch, kind, bits, more):
    """On a CPU, where vLLM has no kernel for such experts."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    quantize_checkpoint(DEMO, tmp_path / "model", kind)
    report = measure_servers(
        tmp_path / "model",
        DEMO / "atomic_profiles",
        names=["heapr-40"],
        plan=PLAN,
        serve_arguments=["--enforce-eager"],
    )
    dense, pruned = report.runs
    assert (dense.profile, pruned.profile) == ("dense", "heapr-40")
    assert dense.dense_bytes == pruned.dense_bytes
    # And of every row the number of its scales.
    assert dense.resident_bytes == pytest.approx(dense.dense_bytes, rel=0.02)
    assert pruned.resident_bytes / pruned.dense_bytes == pytest.approx(0.6, abs=more)
    assert dense.dense_bytes == DENSE_BYTES * bits / 16
