"""What the admin endpoint adds to vLLM's `/metrics`.

Safe with several API servers, whose files prometheus_client merges: of a gauge, what was set last,
by whichever of them, counts; counters and histograms are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_args

from prometheus_client import Counter, Gauge, Histogram

from vllm_atomic_moe.engine.switch import Outcome, SwitchRecord

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BYTES = ("dense", "resident", "active")


class SwitchMetrics:
    """The metrics of one process; make them once (`switch_metrics`)."""

    def __init__(self) -> None:
        self._active = Gauge(
            "atomic_moe_active_profile",
            "1 for the pruning profile that answers requests, 0 for the other resident ones.",
            ["profile"],
            multiprocess_mode="mostrecent",
        )
        self._bytes = Gauge(
            "atomic_moe_expert_bytes",
            "Bytes of routed-expert weights, all ranks: dense (all atoms), resident (in memory), "
            "active (kept by the active profile).",
            ["kind"],
            multiprocess_mode="mostrecent",
        )
        self._switches = Counter(
            "atomic_moe_switches", "Attempts to switch the profile, by outcome.", ["outcome"]
        )
        for outcome in get_args(Outcome):  # from zero, so that the first of a kind is an increase
            self._switches.labels(outcome)
        self._switch_s = Histogram(
            "atomic_moe_switch_seconds",
            "Seconds from taking a switch to its end, whatever its outcome.",
            buckets=BUCKETS_S,
        )
        self._drain_s = Histogram(
            "atomic_moe_drain_seconds",
            "Seconds of it until no request was running.",
            buckets=BUCKETS_S,
        )

    def show(self, status: Mapping[str, Any]) -> None:
        """Set the gauges to a status of `ProfileSwitcher.status`."""
        for name in status["resident"]:
            self._active.labels(name).set(name == status["active"])
        for kind in BYTES:
            self._bytes.labels(kind).set(status[f"{kind}_bytes"])

    def count(self, outcome: Outcome, record: SwitchRecord | None) -> None:
        """Count an attempt; `record` is None where the switch did not begin."""
        self._switches.labels(outcome).inc()
        if record is not None:
            self._switch_s.observe(record.total_ms / 1000)
            self._drain_s.observe(record.drain_ms / 1000)


@functools.cache
def switch_metrics() -> SwitchMetrics:
    """The metrics of this process: prometheus_client refuses to make them twice."""
    return SwitchMetrics()
