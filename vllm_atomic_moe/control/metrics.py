"""The metrics that the plug-in adds to vLLM's `/metrics`.

Safe with several API servers, as prometheus_client merges their files: a gauge has the value that
any of them set last; counters are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_args

from prometheus_client import Counter, Gauge

from vllm_atomic_moe.control.errors import Outcome

BYTES = ("dense", "resident", "active")


class ProfileMetrics:
    """The metrics of one process; make them once (`profile_metrics`)."""

    def __init__(self) -> None:
        def gauge(name: str, words: str, label: str = "profile") -> Gauge:
            return Gauge(f"atomic_moe_{name}", words, [label], multiprocess_mode="mostrecent")

        self._gauges = {
            "active": gauge(
                "active_profile",
                "1 for the profile of requests that do not name one, 0 for others.",
            ),
            "running": gauge("running", "Running requests, by profile."),
            "waiting": gauge("waiting", "Waiting requests, by profile."),
        }
        self._bytes = gauge(
            "expert_bytes",
            "Bytes of routed-expert weights, all ranks: dense (all atoms), resident (in memory), "
            "active (kept by the active profile).",
            "kind",
        )
        self._requests = Counter(
            "atomic_moe_requests", "Requests admitted since the start, by profile.", ["profile"]
        )
        self._changes = Counter(
            "atomic_moe_profile_changes",
            "Attempts to activate, load or unload a profile, by outcome.",
            ["outcome"],
        )
        for outcome in get_args(Outcome):  # from zero, so that the first one is an increase
            self._changes.labels(outcome)
        self._shown: set[str] = set()

    def show(self, status: Mapping[str, Any]) -> None:
        """Set the gauges to a status, as in the answer to `GET /atomic/v1/status`."""
        profiles = status["profiles"]
        for name in self._shown - profiles.keys():  # unloaded
            for gauge in self._gauges.values():
                gauge.labels(name).set(0)
        for name, counts in profiles.items():
            self._requests.labels(name)
            self._gauges["active"].labels(name).set(name == status["active"])
            for kind in ("running", "waiting"):
                self._gauges[kind].labels(name).set(counts[kind])
        self._shown |= profiles.keys()
        for kind in BYTES:
            self._bytes.labels(kind).set(status["memory"][f"{kind}_bytes"])

    def count_request(self, profile: str) -> None:
        """Count a request that this process admitted."""
        self._requests.labels(profile).inc()

    def count_change(self, outcome: Outcome) -> None:
        """Count an attempt to change what is served."""
        self._changes.labels(outcome).inc()


@functools.cache
def profile_metrics() -> ProfileMetrics:
    """The metrics of this process: prometheus_client refuses to make them twice."""
    return ProfileMetrics()
