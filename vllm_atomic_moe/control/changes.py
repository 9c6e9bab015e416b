"""Changes of what is served: on all engines and all API servers, or on none.

A change is made and numbered at the first engine, taken by the others, then published to the API
servers, and done when all of these have taken it. Where an engine does not answer, the change is
taken back, which is a change itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_atomic_moe.control.catalogue import Catalogue
from vllm_atomic_moe.control.errors import AdminError, unavailable
from vllm_atomic_moe.engine.attach import call_engine, engines_of
from vllm_atomic_moe.engine.requests import Admission

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from vllm_atomic_moe.control.models import Running

logger = init_logger(f"vllm.{__name__}")

# An engine answers between two steps: one that does not by then has stopped, or computes a very
# long prompt on a very slow machine.
ENGINE_TIMEOUT_S = 30.0
# An API server takes what is new as soon as its event loop is free.
SERVER_TIMEOUT_S = 10.0
# While waiting: how often to see whether the engines are still alive.
WATCH_S = 1.0

State = dict[str, Any]


def _content(served: State) -> tuple[Any, ...]:
    """What engines must agree on; the number of a change that was taken back is not among it."""
    return served["active"], served["loaded"]


class Changes:
    """What the admin endpoint of one API server asks of the engines. Others may ask as well."""

    def __init__(
        self, client: EngineClient, offered: Admission, description: Mapping[str, Any]
    ) -> None:
        """Connect with the engines.

        Args:
            client: of the engines.
            offered: what this API server offers.
            description: of `CoreProfiles.describe`.
        """
        self._client = client
        self._offered = offered
        self._description = description
        self._calls: set[asyncio.Future[Any]] = set()
        self.catalogue = Catalogue(description)

    # --- questions --------------------------------------------------------------------------------

    async def status(self) -> State:
        """What all engines say.

        Raises:
            AdminError: 503, an engine does not answer.
        """
        engines = await self._all("status")
        served = engines[0]["served"]
        ranks = [rank for engine in engines for rank in engine["ranks"]]
        description = self._description
        active = served["loaded"][served["active"]]
        sums: dict[str, Counter[str]] = {name: Counter() for name in served["loaded"]}
        for engine in engines:
            for name in sums.keys() & engine["requests"].keys():
                sums[name].update(engine["requests"][name])
        return {
            "active": served["active"],
            "generation": served["generation"],
            "agreed": all(_content(engine["served"]) == _content(served) for engine in engines),
            "engines": len(engines),
            "profiles": {
                name: {
                    "slot": profile["slot"],
                    **{key: sums[name][key] for key in ("running", "waiting", "admitted")},
                }
                for name, profile in served["loaded"].items()
            },
            "memory": {
                "dense_bytes": description["dense_bytes"],
                "resident_bytes": sum(rank["resident_bytes"] for rank in ranks),
                "active_bytes": active["kept_atoms"] * description["atom_bytes"],
                "index_bytes": sum(rank["index_bytes"] for rank in ranks),
                "rank_resident_bytes": [rank["resident_bytes"] for rank in ranks],
            },
        }

    async def profiles(self) -> list[State]:
        """Every valid profile of the directory. Raises as `Catalogue`."""
        return await asyncio.to_thread(self.catalogue.profiles, self._offered.served)

    async def profile(self, name: str) -> State:
        """One profile, with widths and live tiles. Raises as `Catalogue` and `status`."""
        served = self._offered.served
        entry = await asyncio.to_thread(self.catalogue.profile, name, served)
        if not entry["loaded"]:
            return {**entry, "live_tiles": None}
        slot = served.loaded[name].slot
        ranks = [rank for engine in await self._all("status") for rank in engine["ranks"]]
        live = sum(rank["live_tiles"][slot] for rank in ranks)
        return {**entry, "live_tiles": live / max(1, sum(rank["tiles"] for rank in ranks))}

    # --- changes ----------------------------------------------------------------------------------

    async def activate(self, profile: str, running: Running) -> State:
        """Make a loaded profile the one of requests that name none.

        Raises:
            AdminError: 404 unknown; 409 not loaded; 503 an engine or API server does not answer.
        """
        if profile not in self._offered.served.loaded:
            await asyncio.to_thread(self.catalogue.read, profile)  # 404 where there is none
        back = {"verb": "activate", "profile": self._offered.served.active, "instead_of": profile}
        state, previous = await self._change("activate", profile, undo=back)
        await self._spread(state, undo={**back, "profile": previous})
        taken = await self._offer(state)
        if running == "abort":
            await self._all("abort", profile=profile)
        return {
            "active": state["active"],
            "previous": previous,
            "generation": state["generation"],
            "running": await self._running(taken if running == "finish" else None),
        }

    async def load(self, name: str) -> State:
        """Load a profile of the directory into a free slot.

        Raises:
            AdminError: 404 unknown; 409 its file is not valid, its atoms are not all in memory, no
                slot is free, or another file was loaded under the name; 503 as `activate`.
        """
        profile = await asyncio.to_thread(self.catalogue.read, name)
        if missing := await asyncio.to_thread(self.catalogue.missing, profile):
            raise AdminError(
                409,
                "AtomsNotResidentError",
                f"profile {name!r} keeps {missing} atoms that are not in memory; "
                "list it in `resident` and restart the server",
            )
        back = {"verb": "free", "profile": name}
        more = {"digest": profile.digest(), "kept_atoms": profile.kept_atoms}
        before = self._offered.served.generation
        state, _ = await self._change("load", name, undo=back, **more)
        await self._spread(state, undo=back)
        await self._offer(state)
        slot = state["loaded"][name]["slot"]
        changed = state["generation"] != before
        answer = {"profile": name, "slot": slot, "generation": state["generation"]}
        return {**answer, "changed": changed}

    async def unload(self, name: str) -> State:
        """Withdraw a profile's name everywhere, then free its slot.

        Raises:
            AdminError: 404 not loaded; 409 active, or requests of it run or wait; 503 as
                `activate`.
        """
        back = {"verb": "offer", "profile": name}
        state, _ = await self._change("withdraw", name, undo=back)
        await self._spread(state, undo=back)
        try:
            taken = await self._offer(state)
            present = (await self._running(taken)).get(name, 0)
            if present or name in taken["held"]:
                raise AdminError(
                    409,
                    "ProfileInUseError",
                    f"profile {name!r} has {present or 'some'} requests that run or wait; "
                    "try again when they have ended",
                )
        except AdminError:
            state, _ = await self._change("offer", name)
            await self._spread(state, undo=None)
            if not self._alone:
                await self._first("publish", served=state)
            raise
        state, _ = await self._change("free", name)
        await self._spread(state, undo=None)
        await self._offer(state)
        return {"profile": name, "generation": state["generation"]}

    # --- their steps ------------------------------------------------------------------------------

    async def _change(
        self, verb: str, profile: str, undo: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[State, str]:
        """Make a change at the first engine; gives the state, and what was active before.

        Where it does not answer, it finds the change and `undo` in its queue, in order.
        """
        change = {"verb": verb, "profile": profile, **more, "publish": self._alone}
        try:
            reply = await self._first("change", **change)
        except AdminError as error:
            if error.status == 503 and undo is not None:
                back = {**undo, "publish": self._alone}
                self._keep(asyncio.ensure_future(self._call(0, "change", back)))
            raise
        return reply["served"], reply["previous"]

    @property
    def _alone(self) -> bool:
        """Whether there is one engine: then a change is published in the same call, and a running
        answer notices two steps of it.
        """
        return len(engines_of(self._client)) == 1

    async def _running(self, taken: State | None) -> dict[str, int]:
        """Requests that run or wait, by profile.

        Args:
            taken: what `_offer` gave, which is enough where there is one engine.
        """
        if taken is not None and self._alone:
            counted = taken["requests"]
        else:
            counted = (await self.status())["profiles"]
        return {name: counts["running"] + counts["waiting"] for name, counts in counted.items()}

    async def _spread(self, state: State, undo: Mapping[str, Any] | None) -> None:
        """Give a state to the other engines.

        Args:
            state: of the first engine.
            undo: the change that takes it back, if there is a way back.

        Raises:
            AdminError: 503, not all of them took it; it was taken back where `undo` says how.
        """
        others = range(1, len(engines_of(self._client)))
        taken = (self._ask(index, "apply", served=state) for index in others)
        replies = await asyncio.gather(*taken, return_exceptions=True)
        errors = [reply for reply in replies if isinstance(reply, BaseException)]
        if not errors:
            return
        if undo is not None:
            back, _ = await self._change(**undo)
            # Whoever is stopped finds both in its queue, in order.
            calls = (self._call(index, "apply", {"served": back}) for index in others)
            for call in calls:
                self._keep(asyncio.ensure_future(call))
            await self._first("publish", served=back)
        message = "; ".join(str(error) for error in errors)
        message += "; nothing was changed" if undo else "; ask for the status"
        if isinstance(errors[0], AdminError) and errors[0].status != 503:  # it answers, and refuses
            raise AdminError(errors[0].status, errors[0].kind, message)
        raise unavailable(message)

    async def _offer(self, state: State) -> State:
        """Publish a state and wait until every API server has taken it.

        Returns:
            What `CoreProfiles.taken` answers.

        Raises:
            AdminError: 503, it names API servers that have not.
        """
        if not self._alone:
            await self._first("publish", served=state)
        generation = state["generation"]
        call = self._call(0, "taken", {"generation": generation})
        try:
            return await self._within(SERVER_TIMEOUT_S, call)
        except TimeoutError:
            late = (await self._first("laggards", generation=generation))["servers"]
        names = ", ".join(str(server) for server in late)
        raise unavailable(
            f"the engines have the change, API servers {names} have not taken it yet; ask again"
        )

    async def _first(self, question: str, **arguments: Any) -> State:
        return await self._ask(0, question, **arguments)

    async def _all(self, question: str, **arguments: Any) -> list[State]:
        engines = range(len(engines_of(self._client)))
        asked = (self._ask(index, question, **arguments) for index in engines)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies  # type: ignore[return-value]

    async def _ask(self, index: int, question: str, **arguments: Any) -> State:
        """What one engine answers.

        Raises:
            AdminError: 404 or 409, it refuses; 503, it does not answer.
        """
        try:
            reply = await self._within(ENGINE_TIMEOUT_S, self._call(index, question, arguments))
        except TimeoutError:
            raise unavailable(
                f"engine {index} does not answer within {ENGINE_TIMEOUT_S:.0f} s"
            ) from None
        except Exception as error:
            said = " ".join(f"{error}".split()) or type(error).__name__
            raise unavailable(f"engine {index} does not answer: {said}") from error
        if not reply["ok"]:
            if reply["kind"] == "EngineUnavailableError":
                raise unavailable(reply["error"])
            status = 404 if reply["kind"] == "NotFoundError" else 409
            raise AdminError(status, reply["kind"], reply["error"])
        return reply

    def _call(self, index: int, question: str, arguments: State) -> Coroutine[Any, Any, Any]:
        return call_engine(self._client, engines_of(self._client)[index], question, arguments)

    async def _within(self, seconds: float, call: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a call, but not for ever; it is never cut off.

        Raises:
            TimeoutError: it took longer.
            Exception: what the call raises; what the engines died of, which answers no call.
        """
        task = asyncio.ensure_future(call)
        self._keep(task)
        deadline = time.monotonic() + seconds
        while not task.done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            await asyncio.wait({task}, timeout=min(left, WATCH_S))
            if self._client.errored and not task.done():
                raise self._client.dead_error
        return task.result()

    def _keep(self, task: asyncio.Future[Any]) -> None:
        self._calls.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more
