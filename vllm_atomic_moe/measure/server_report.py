"""The server benchmark's requests and results, with their medians, spreads and ratios."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_atomic_moe.files.profiles import DENSE, PruningProfile


@dataclass(frozen=True, slots=True)
class Phase:
    """Requests of one shape.

    Attributes:
        name: of the phase.
        input_tokens: of every prompt; random tokens.
        output_tokens: of every answer; the end-of-sequence token is ignored.
        concurrency: requests in flight.
        requests: in all.
    """

    name: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    requests: int


PHASES = (
    Phase("prefill", input_tokens=512, output_tokens=1, concurrency=4, requests=16),
    Phase("decode-1", input_tokens=32, output_tokens=64, concurrency=1, requests=4),
    Phase("decode-8", input_tokens=32, output_tokens=64, concurrency=8, requests=16),
)


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """The requests to every server.

    Attributes:
        phases: in this order.
        repeats: of every phase on one server.
        warmups: requests before every phase that are not counted.
        changes: of the active profile on an idle server.
        seed: of the prompts.
        start_timeout_s: how long a server may take to become healthy.
    """

    phases: tuple[Phase, ...] = PHASES
    repeats: int = 1
    warmups: int = 2
    changes: int = 20
    seed: int = 0
    start_timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds over the requests of one phase."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True, slots=True)
class PhaseRun:
    """One phase on one server, as `vllm bench serve` measures it.

    Attributes:
        phase: its name.
        requests_per_s: finished requests.
        output_tokens_per_s: generated tokens.
        total_tokens_per_s: prompt and generated tokens.
        ttft_ms: time to first token.
        tpot_ms: time per output token after the first; None where there is only one.
    """

    phase: str
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Latency
    tpot_ms: Latency | None


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One server from start to end.

    Attributes:
        profile: what it served; `dense` is vLLM's default loader, or ours where quantized experts
            are served on a CPU.
        round: 0, 1, …
        load_s: the whole load: building the model, reading the weights from the page cache, and
            repacking them.
        start_s: from the start of the process to a healthy server.
        dense_bytes: of all routed experts; None for `dense`: its loader does not say.
        resident_bytes: of the routed experts in memory; None as above.
        peak_bytes: peak anonymous memory of the largest process during the load.
        rest_bytes: the same memory after the load, before the KV cache; on a GPU the model's
            memory there, as vLLM logs it.
        kv_tokens: tokens for which the KV cache has room.
        kv_gib: memory of the KV cache.
        phases: what was measured, in order.
    """

    profile: str
    round: int
    load_s: float
    start_s: float
    dense_bytes: int | None
    resident_bytes: int | None
    peak_bytes: int
    rest_bytes: int
    kv_tokens: int | None
    kv_gib: float | None
    phases: tuple[PhaseRun, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of repeated measurements."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of the active profile on an idle server.

    Attributes:
        profiles: names of the loaded profiles.
        resident_bytes: memory of the atoms that any of them keeps.
        change_ms: from request to answer of the admin endpoint.
    """

    profiles: tuple[str, ...]
    resident_bytes: int
    change_ms: Spread


@dataclass(frozen=True, slots=True)
class PhaseSummary:
    """One phase over all runs of one profile.

    Attributes:
        phase: its name.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: see `PhaseRun`.
        ttft_ms, tpot_ms: of the runs' medians.
        ratio: median throughput over that of dense; all three throughputs have the same ratio,
            since the requests are the same.
    """

    phase: str
    requests_per_s: Spread
    output_tokens_per_s: Spread
    total_tokens_per_s: Spread
    ttft_ms: Spread
    tpot_ms: Spread | None
    ratio: float


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    """All servers of one profile.

    Attributes:
        profile: its name; `dense` comes first.
        kept: fraction of atoms kept.
        bound: 1 / kept, the throughput ratio if only the experts took time; None if nothing is
            kept.
        resident_bytes: of routed experts.
        load_s, start_s: see `ServerRun`.
        load_ratio: median of load_s over that of dense.
        peak_bytes, rest_bytes: see `ServerRun`; the highest and the median.
        freed: bytes by which rest_bytes is below that of dense, over the pruned bytes; None if
            nothing is pruned. With several ranks it covers the largest process only.
        kv_tokens, kv_gib: see `ServerRun`, of the first server.
        kv_tokens_gained: over dense.
        phases: in the plan's order.
    """

    profile: str
    kept: float
    bound: float | None
    resident_bytes: int
    load_s: Spread
    start_s: Spread
    load_ratio: float
    peak_bytes: int
    rest_bytes: int
    freed: float | None
    kv_tokens: int | None
    kv_gib: float | None
    kv_tokens_gained: int | None
    phases: tuple[PhaseSummary, ...]


@dataclass(frozen=True, slots=True)
class ServerReport:
    """The result of `measure_servers`.

    Attributes:
        model: directory.
        serve_arguments: more flags of every server.
        plan: the requests.
        profiles: summaries, dense first.
        runs: every server, in order.
        changes: between the measured profiles; None if there is only one.
    """

    model: str
    serve_arguments: tuple[str, ...]
    plan: ServerPlan
    profiles: tuple[ProfileSummary, ...]
    runs: tuple[ServerRun, ...]
    changes: Changes | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def summarize(
    chosen: Sequence[PruningProfile], runs: Sequence[ServerRun], plan: ServerPlan
) -> tuple[ProfileSummary, ...]:
    """One summary per profile, dense first."""
    dense_bytes = next((run.dense_bytes for run in runs if run.dense_bytes is not None), 0)
    by_profile = {
        profile.name: [run for run in runs if run.profile == profile.name] for profile in chosen
    }
    dense = by_profile[DENSE]
    dense_load_s = statistics.median(run.load_s for run in dense)
    dense_rest = int(statistics.median(run.rest_bytes for run in dense))
    rows = []
    for profile in chosen:
        own = by_profile[profile.name]
        load_s = Spread.of([run.load_s for run in own])
        gained = None
        if own[0].kv_tokens is not None and dense[0].kv_tokens is not None:
            gained = own[0].kv_tokens - dense[0].kv_tokens
        resident = own[0].resident_bytes
        rest = int(statistics.median(run.rest_bytes for run in own))
        pruned = (1 - profile.kept) * dense_bytes
        rows.append(
            ProfileSummary(
                profile=profile.name,
                kept=profile.kept,
                bound=1 / profile.kept if profile.kept else None,
                resident_bytes=dense_bytes if resident is None else resident,
                load_s=load_s,
                start_s=Spread.of([run.start_s for run in own]),
                load_ratio=load_s.median / dense_load_s,
                peak_bytes=max(run.peak_bytes for run in own),
                rest_bytes=rest,
                freed=(dense_rest - rest) / pruned if pruned else None,
                kv_tokens=own[0].kv_tokens,
                kv_gib=own[0].kv_gib,
                kv_tokens_gained=gained,
                phases=tuple(_summarize_phase(phase.name, own, dense) for phase in plan.phases),
            )
        )
    return tuple(rows)


def _summarize_phase(
    name: str, own: Sequence[ServerRun], dense: Sequence[ServerRun]
) -> PhaseSummary:
    found = [phase for run in own for phase in run.phases if phase.phase == name]
    reference = [phase for run in dense for phase in run.phases if phase.phase == name]
    requests = Spread.of([phase.requests_per_s for phase in found])
    tpot = [phase.tpot_ms.median for phase in found if phase.tpot_ms is not None]
    return PhaseSummary(
        phase=name,
        requests_per_s=requests,
        output_tokens_per_s=Spread.of([phase.output_tokens_per_s for phase in found]),
        total_tokens_per_s=Spread.of([phase.total_tokens_per_s for phase in found]),
        ttft_ms=Spread.of([phase.ttft_ms.median for phase in found]),
        tpot_ms=Spread.of(tpot) if tpot else None,
        ratio=requests.median / statistics.median(phase.requests_per_s for phase in reference),
    )
