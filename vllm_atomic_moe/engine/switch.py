"""The switch: one engine from one profile to another, all or nothing.

The order is the promise: validate; take the switch in the workers; drain; prepare on every rank;
commit on every rank; empty the prefix cache; set vLLM's weight version; settle; resume; release.
Whatever fails before it is settled, every rank goes back to the old profile; if going back fails,
the engine stays paused and says so. The state lives in the workers (`engine/worker.py`), this side
only acts on it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vllm.logger import init_logger

from vllm_atomic_moe.engine import Mode
from vllm_atomic_moe.engine.attach import call_engine_core
from vllm_atomic_moe.engine.worker import CONTROL, DisplacedError

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = init_logger(f"vllm.{__name__}")

Outcome = Literal["switched", "unchanged", "refused", "timeout", "rolled_back", "failed"]
# Of the engine core, attached by `register()`: requests that have begun and are not running.
COUNT_INTERRUPTED = "atomic_moe_count_interrupted"
# Beyond draining no step of a switch takes long: one that does not answer by then has failed.
STEP_TIMEOUT_S = 60.0
# Going back has more patience: giving up stops the service.
BACK_TIMEOUT_S = 600.0
# More than all steps there and back. Only then may another API server displace the switch.
LEASE_BEYOND_TIMEOUT_S = 2 * 3600.0
# How old an API server's knowledge of failures may be that health checks are answered with.
VERDICT_AGE_S = 1.0
# While waiting: how often to see whether the engine is still alive.
ENGINE_WATCH_S = 1.0
# Between resuming and pausing again: long enough for a step of the engine to begin.
STEP_GAP_S = 0.005


class SwitchError(Exception):
    """A switch, or a question, that is refused or has failed.

    Attributes:
        status: HTTP status.
        kind: stable name of the reason, the `type` of vLLM's ErrorResponse.
        message: one line.
        outcome: what became of the switch.
        record: of a switch that began, else None.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        outcome: Outcome = "refused",
        record: SwitchRecord | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message
        self.outcome, self.record = outcome, record


@dataclass(frozen=True, slots=True)
class SwitchRecord:
    """A switch that began.

    Attributes:
        profile: what was asked for.
        previous: what was active before.
        mode: `wait` or `abort`.
        outcome: switched, timeout, rolled_back or failed.
        error: why it did not switch, or None.
        finished_at: seconds since the epoch.
        drain_ms: milliseconds until no request was running.
        commit_ms: milliseconds of the commit on all ranks.
        total_ms: milliseconds since it began.
    """

    profile: str
    previous: str
    mode: Mode
    outcome: Outcome
    error: str | None
    finished_at: float
    drain_ms: float
    commit_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """A switch that succeeded; `record` is None where the profile was active already."""

    active: str
    previous: str
    generation: int
    record: SwitchRecord | None = None


@dataclass(slots=True)
class _Attempt:
    """A switch under way."""

    profile: str
    previous: str
    mode: Mode
    timeout_s: float
    displaced: str | None = None
    touched: bool = False  # whether the ranks may compute anything but `previous`
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    start: float = field(default_factory=time.monotonic)
    drain_s: float = 0.0
    commit_s: float = 0.0

    @property
    def seconds_left(self) -> float:
        """For draining."""
        return self.start + self.timeout_s - time.monotonic()

    def record(self, outcome: Outcome, error: str | None = None) -> SwitchRecord:
        return SwitchRecord(
            profile=self.profile,
            previous=self.previous,
            mode=self.mode,
            outcome=outcome,
            error=error,
            finished_at=time.time(),
            drain_ms=1000 * self.drain_s,
            commit_ms=1000 * self.commit_s,
            total_ms=1000 * (time.monotonic() - self.start),
        )


class _DrainTimeoutError(Exception):
    """Requests were still running when the time was up."""


class ProfileSwitcher:
    """Switches one engine. Several of them, in several API servers, may stand before one engine.

    Attributes:
        failure: why the engine was left paused by this one, or None. The workers know as well,
            unless they could not be told.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._calls: set[asyncio.Task[Any]] = set()
        self._verdict: asyncio.Task[None] | None = None
        self._verdict_at = -VERDICT_AGE_S
        self._failed_elsewhere = False
        self.failure: str | None = None

    async def status(self) -> dict[str, Any]:
        """What `WorkerProfiles.status` says on every rank, with the memory of all of them.

        Raises:
            SwitchError: 503, the engine does not answer, or serves no pruned model.
        """
        ranks = await self._ask("status")
        failure = self.failure or next((rank["failure"] for rank in ranks if rank["failure"]), None)
        views = {(rank["active"], rank["generation"], rank["owner"]) for rank in ranks}
        if len(views) > 1:
            failure = failure or f"ranks disagree on what is active: {sorted(map(str, views))}"
        return {
            **ranks[0],
            "state": "failed" if failure else ranks[0]["state"],
            "failure": failure,
            "rank_resident_bytes": [rank["resident_bytes"] for rank in ranks],
            "resident_bytes": sum(rank["resident_bytes"] for rank in ranks),
            "index_bytes": sum(rank["index_bytes"] for rank in ranks),
        }

    async def announce(self) -> None:
        """Set vLLM's weight version to what is active, once this server has started.

        Another server's switch sets it too, and has the last word. Raises as `status`.
        """
        seen = None
        while seen != (status := await self.status())["generation"]:
            if status["state"] == "serving":
                seen = status["generation"]
                await self._set_weight_version(status["active"])
            await asyncio.sleep(STEP_GAP_S)

    def has_failed(self) -> bool:
        """Whether this one's switch has failed, or another's, as far as is known.

        Never waits for the engine: it asks in the background, and the next call knows. An engine
        that is too busy to answer has not failed.
        """
        idle = self._verdict is None or self._verdict.done()
        if idle and time.monotonic() - self._verdict_at >= VERDICT_AGE_S:
            self._verdict = asyncio.ensure_future(self._ask_for_verdict())
        return self.failure is not None or self._failed_elsewhere

    async def _ask_for_verdict(self) -> None:
        with suppress(SwitchError):
            self._failed_elsewhere = (await self.status())["state"] == "failed"
        self._verdict_at = time.monotonic()

    async def profiles(self) -> list[dict[str, Any]]:
        """Every valid profile, resident or not. Raises as `status`."""
        return (await self._ask("profiles"))[0]["profiles"]

    async def profile(self, name: str) -> dict[str, Any]:
        """One profile, with its widths per layer.

        Raises:
            SwitchError: 404, there is none; and as `status`.
        """
        profiles = {profile["name"]: profile for profile in await self.profiles()}
        if name not in profiles:
            raise _unknown(name, list(profiles))
        return {**profiles[name], **(await self._ask("profile", name=name))[0]}

    async def switch(self, profile: str, mode: Mode, timeout_s: float) -> SwitchResult:
        """Make `profile` the active one.

        To be run in a task that nobody cancels: a switch that is cut off leaves the engine paused,
        until another one displaces it.

        Args:
            profile: a resident profile.
            mode: `wait` lets the requests that have begun finish, `abort` ends all there are.
            timeout_s: how long draining may take.

        Raises:
            SwitchError: 404 unknown; 409 not resident, or another switch or pause is on; 503 the
                time ran out, the switch failed, or the engine does not answer.
        """
        status = await self.status()
        displaced = _validate(status, profile)
        if status["active"] == profile and displaced is None:
            return SwitchResult(profile, profile, status["generation"])
        attempt = _Attempt(profile, status["active"], mode, timeout_s, displaced)
        await self._begin(attempt, status["generation"])
        try:
            await self._drain(attempt)
            await self._change(attempt)
        except Exception as error:
            await self._go_back(attempt, error)
        try:  # no way back from here: some ranks may have settled
            await self._let_go(attempt, attempt.record("switched"), STEP_TIMEOUT_S)
        except Exception as error:
            await self._give_up(
                attempt, f"{profile} is committed, letting go failed: {_say(error)}"
            )
        record = attempt.record("switched")
        return SwitchResult(profile, attempt.previous, status["generation"] + 1, record)

    # --- its steps, in order ----------------------------------------------------------------------

    async def _begin(self, attempt: _Attempt, generation: int) -> None:
        """Take the switch on every rank, or on none."""
        try:
            ranks = await self._ranks(
                "begin",
                owner=attempt.owner,
                profile=attempt.profile,
                generation=generation,
                displaced=attempt.displaced,
                lease_s=attempt.timeout_s + LEASE_BEYOND_TIMEOUT_S,
            )
            refused = [rank["error"] for rank in ranks if not rank["ok"]]
            if refused:
                raise SwitchError(409, "SwitchInProgressError", f"{refused[0]}; try again")
            if attempt.displaced is None:
                if await self._within(STEP_TIMEOUT_S, self._client.is_paused()):
                    raise SwitchError(
                        409,
                        "EnginePausedError",
                        "the engine is paused by somebody else; resume it first",
                    )
                return
        except Exception:
            # Wherever it was taken, or is still going to be: calls are heard in order.
            with suppress(Exception):
                await self._ranks("release", owner=attempt.owner)
            raise
        logger.warning("Profile switch: taking over from one that was never finished")
        attempt.touched = True

    async def _drain(self, attempt: _Attempt) -> None:
        """Pause the engine with no request half way.

        A pause that waits is complete too while a preempted request, half written, is queued: it
        would go on under the new profile. While there are any, the engine is let go on for a step.
        """
        start = time.monotonic()
        try:
            while True:
                pause = self._client.pause_generation(mode=attempt.mode, clear_cache=False)
                try:
                    await self._within(attempt.seconds_left, pause)
                except TimeoutError:
                    raise _DrainTimeoutError from None
                interrupted = attempt.mode == "wait" and await self._interrupted()
                if not interrupted:
                    return
                logger.info("Profile switch: %d preempted requests go on first", interrupted)
                if attempt.seconds_left <= 0:
                    raise _DrainTimeoutError
                await self._within(STEP_TIMEOUT_S, self._client.resume_generation())
                await asyncio.sleep(STEP_GAP_S)
        finally:
            attempt.drain_s = time.monotonic() - start

    async def _interrupted(self) -> int:
        return await self._within(STEP_TIMEOUT_S, call_engine_core(self._client, COUNT_INTERRUPTED))

    async def _change(self, attempt: _Attempt) -> None:
        """From a paused engine on the old profile to a paused engine on the new one."""
        if attempt.displaced is not None:
            await self._all_ranks("rollback", attempt)
        prepared = await self._all_ranks("prepare", attempt)
        if len({rank["digest"] for rank in prepared}) != 1:
            raise RuntimeError(f"the ranks hold different profiles called {attempt.profile!r}")
        attempt.touched = True
        start = time.monotonic()
        await self._all_ranks("commit", attempt)
        attempt.commit_s = time.monotonic() - start
        await self._forget_prefixes()
        await self._set_weight_version(attempt.profile)

    async def _forget_prefixes(self) -> None:
        reset = self._client.reset_prefix_cache(reset_connector=True)
        if not await self._within(STEP_TIMEOUT_S, reset):
            raise RuntimeError("the prefix cache was not reset")

    async def _set_weight_version(self, profile: str) -> None:
        await self._within(STEP_TIMEOUT_S, self._client.update_weight_version(profile))

    async def _let_go(self, attempt: _Attempt, record: SwitchRecord, patience_s: float) -> None:
        """Settle, resume, and let others switch."""
        await self._all_ranks(
            "settle",
            attempt,
            patience_s,
            switched=record.outcome == "switched",
            record=asdict(record),
        )
        await self._within(patience_s, self._client.resume_generation())
        await self._all_ranks("release", attempt, patience_s)

    async def _go_back(self, attempt: _Attempt, error: Exception) -> None:
        """To the old profile on every rank, serving; raises what the caller is told."""
        if isinstance(error, DisplacedError):
            raise SwitchError(503, "SwitchFailedError", f"{error}; nothing more was done")
        timed_out = isinstance(error, _DrainTimeoutError)
        reason = _say(error)
        if timed_out:
            reason = f"requests were still running after {attempt.timeout_s:g} s"
        outcome: Outcome = "timeout" if timed_out else "rolled_back"
        logger.warning("Profile switch: going back to %s: %s", attempt.previous, reason)
        try:
            if attempt.touched:
                await self._all_ranks("rollback", attempt, BACK_TIMEOUT_S)
                await self._set_weight_version(attempt.previous)
            if attempt.displaced is not None:  # who knows what ran on which profile before
                await self._forget_prefixes()
            record = attempt.record(outcome, reason)
            await self._let_go(attempt, record, BACK_TIMEOUT_S)
        except Exception as second:
            await self._give_up(attempt, f"{reason}; going back failed: {_say(second)}")
        kind = "SwitchTimeoutError" if timed_out else "SwitchFailedError"
        remedy = f"{attempt.previous} goes on serving"
        if timed_out:
            remedy = "nothing changed, raise timeout_s or use mode abort"
        raise SwitchError(503, kind, f"{reason}; {remedy}", outcome, record)

    async def _give_up(self, attempt: _Attempt, reason: str) -> None:
        """Leave the engine paused, and say so wherever it can be heard."""
        paused = "the engine stays paused"
        try:
            pause = self._client.pause_generation(mode="abort", clear_cache=False)
            await self._within(STEP_TIMEOUT_S, pause)
        except Exception as error:
            paused = f"the engine could not be paused ({_say(error)})"
        self.failure = f"{reason}; {paused}"
        logger.error("Profile switch: failed: %s", self.failure)
        record = attempt.record("failed", reason)
        try:
            owner, failure = attempt.owner, self.failure
            await self._ranks("fail", owner=owner, failure=failure, record=asdict(record))
        except Exception as error:
            logger.error("Profile switch: the workers could not be told: %s", _say(error))
        message = f"{self.failure}, restart the server"
        raise SwitchError(503, "SwitchFailedError", message, "failed", record)

    # --- calls ------------------------------------------------------------------------------------

    async def _ask(self, verb: str, **arguments: Any) -> list[dict[str, Any]]:
        """A question to all ranks: what goes wrong is said as HTTP says it."""
        try:
            ranks = await self._ranks(verb, **arguments)
        except Exception as error:
            raise engine_unavailable(f"the engine does not answer: {_say(error)}") from error
        for rank in ranks:
            if not rank["ok"]:
                raise engine_unavailable(rank["error"])
        return ranks

    async def _all_ranks(
        self,
        verb: str,
        attempt: _Attempt,
        patience_s: float = STEP_TIMEOUT_S,
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """A step of the switch on every rank; raises if one of them reports a failure."""
        ranks = await self._ranks(verb, patience_s, owner=attempt.owner, **arguments)
        for index, rank in enumerate(ranks):
            if rank.get("displaced"):
                raise DisplacedError(rank["error"])
            if not rank["ok"]:
                raise RuntimeError(f"{verb} failed on rank {index}: {rank['error']}")
        return ranks

    async def _ranks(
        self, verb: str, patience_s: float = STEP_TIMEOUT_S, **arguments: Any
    ) -> list[dict[str, Any]]:
        """One call to every rank. No time-out of vLLM's, which would mix up later replies."""
        call = self._client.collective_rpc(CONTROL, args=(verb, arguments))
        return await self._within(patience_s, call)

    async def _within(self, seconds: float, call: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a call, but not for ever; it is never cut off.

        Raises:
            TimeoutError: it took longer.
            Exception: what the call raises; what the engine died of, which answers no call.
        """
        task = asyncio.ensure_future(call)
        self._calls.add(task)
        task.add_done_callback(self._forget)
        deadline = time.monotonic() + seconds
        while not task.done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
            await asyncio.wait({task}, timeout=min(left, ENGINE_WATCH_S))
            if self._client.errored and not task.done():
                raise self._client.dead_error
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more


def engine_unavailable(message: str) -> SwitchError:
    """503: there is no engine, or it does not answer."""
    return SwitchError(503, "EngineUnavailableError", message)


def _validate(status: Mapping[str, Any], profile: str) -> str | None:
    """Refuse what cannot be; gives the owner of an unfinished switch that may be displaced."""
    if profile not in status["known"]:
        raise _unknown(profile, status["known"])
    if profile not in status["resident"]:
        raise SwitchError(
            409,
            "ProfileNotResidentError",
            f"profile {profile!r} is not resident, {', '.join(status['resident'])} are; "
            "list it in `resident` and restart the server",
        )
    if status["failure"]:
        raise SwitchError(
            503, "SwitchFailedError", f"an earlier switch failed: {status['failure']}; restart"
        )
    if status["state"] == "switching" and status["lease_s"] > 0:
        raise SwitchError(409, "SwitchInProgressError", "another switch is under way; try again")
    return status["owner"]


def _unknown(profile: str, known: list[str]) -> SwitchError:
    return SwitchError(
        404, "NotFoundError", f"profile {profile[:80]!r} is unknown; known are {', '.join(known)}"
    )


def _say(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
