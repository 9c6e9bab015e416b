"""Changes to what is served: on all engines and all API servers, or on none.

The first engine makes and numbers a change, the others take it, then it is published to the API
servers; it is done when all of them have taken it. If an engine does not answer, the change is
taken back, which is a change too.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_atomic_moe.control.catalogue import Catalogue, bytes_of
from vllm_atomic_moe.control.errors import AdminError, unavailable
from vllm_atomic_moe.engine.attach import call_engine, engines_of
from vllm_atomic_moe.engine.requests import Admission

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from vllm_atomic_moe.control.models import Running

logger = init_logger(f"vllm.{__name__}")

# An engine answers between two steps. If it takes longer than this, it has stopped, or computes a
# very long prompt on a very slow machine.
ENGINE_TIMEOUT_S = 30.0
# An API server takes news as soon as its event loop is free.
SERVER_TIMEOUT_S = 10.0
# Long enough for engines that answer to take a change back.
UNDO_S = 2.0
# How often to check, while waiting, that the engines are alive.
WATCH_S = 1.0

State = dict[str, Any]


def _content(served: State) -> tuple[Any, ...]:
    """What engines must agree on; numbers of changes that were taken back do not count."""
    return served["active"], served["loaded"]


class Changes:
    """What the admin endpoint of one API server asks of the engines; others may ask too."""

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
            AdminError: 503, one of them does not answer.
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
                "active_bytes": bytes_of(active["kept_atoms"], description),
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
        """Make a loaded profile the active one: requests that do not name a profile get it.

        Raises:
            AdminError: 404 unknown; 409 not loaded; 503 an engine or API server does not answer.
        """
        if profile not in self._offered.served.loaded:
            await asyncio.to_thread(self.catalogue.read, profile)  # 404 where there is none
        change = await self._change("activate", profile)
        if running == "abort":
            try:
                await self._all("abort", profile=profile)
            except AdminError as error:
                raise unavailable(
                    f"{profile} is active now; requests of others may go on: {error}"
                ) from None
        return {
            "active": change["served"]["active"],
            "previous": change["previous"],
            "generation": change["served"]["generation"],
            "running": await self._running(change if running == "finish" else None),
        }

    async def load(self, name: str) -> State:
        """Load a profile of the directory into a free slot.

        Raises:
            AdminError: 404 unknown; 409 its file is not valid, not all of its atoms are in memory,
                the routers cannot apply it, no slot is free, or another file was loaded under
                the name; 503 as `activate`.
        """
        profile = await asyncio.to_thread(self.catalogue.servable, name)
        change = await self._change(
            "load", name, digest=profile.digest(), kept_atoms=profile.kept_atoms
        )
        served = change["served"]
        return {
            "profile": name,
            "slot": served["loaded"][name]["slot"],
            "generation": served["generation"],
            "changed": change["changed"],
        }

    async def unload(self, name: str) -> State:
        """Withdraw a profile's name everywhere, then free its slot.

        Raises:
            AdminError: 404 not loaded; 409 active, or requests of it run or wait; 503 as
                `activate`.
        """
        self._refuse_in_use(name, (await self._running(None)).get(name, 0))
        change = await self._change("withdraw", name)
        try:
            present = (await self._running(change)).get(name, 0)
            self._refuse_in_use(name, present or name in change["held"])
            change = await self._change("free", name)
        except AdminError:
            await self._change("offer", name)
            raise
        return {"profile": name, "generation": change["served"]["generation"]}

    # --- their steps ------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether there is one engine: then a change is published in the same call, and a running
        answer notices two steps of it.
        """
        return len(engines_of(self._client)) == 1

    async def _change(self, verb: str, profile: str, **details: Any) -> State:
        """Make a change on all engines, or on none.

        Returns:
            The answers of `CoreProfiles.change` and `CoreProfiles.taken`.

        Raises:
            AdminError: 404 or 409, an engine refuses; 503, an engine or API server does not answer.
        """
        turn = uuid.uuid4().hex
        call = {"turn": turn, "verb": verb, "profile": profile, "publish": self._alone}
        try:
            change = await self._first("change", **call, **details)
            served = change["served"]
            if not self._alone:
                await self._spread(served)
                await self._first("publish", turn=turn, served=served)
        except AdminError as error:
            if not self._alone:
                await self._undo(turn)
            elif error.status == 503:
                error.message += "; when it does, the change is made"
            raise
        return {**change, **await self._taken(served["generation"])}

    async def _spread(self, served: State) -> None:
        """Give a state to the other engines.

        Raises:
            AdminError: one of them did not take it.
        """
        others = range(1, len(engines_of(self._client)))
        asked = (self._ask(index, "apply", served=served) for index in others)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        errors = [reply for reply in replies if isinstance(reply, BaseException)]
        if errors:
            message = "; ".join(str(error) for error in errors)
            first = errors[0] if isinstance(errors[0], AdminError) else unavailable(message)
            raise AdminError(first.status, first.kind, f"{message}; nothing was changed")

    async def _undo(self, turn: str) -> None:
        """Take a change back. An engine that is stopped finds both in its queue, in order; nobody
        waits for it.
        """

        async def everywhere() -> None:
            served = (await self._call(0, "undo", {"turn": turn}))["served"]
            others = range(1, len(engines_of(self._client)))
            await asyncio.gather(
                *(self._call(index, "apply", {"served": served}) for index in others)
            )

        task = asyncio.ensure_future(everywhere())
        self._keep(task)
        await asyncio.wait({task}, timeout=UNDO_S)

    async def _taken(self, generation: int) -> State:
        """Wait until all API servers have taken a state.

        Raises:
            AdminError: 503, it names the API servers that have not.
        """
        call = self._call(0, "taken", {"generation": generation})
        try:
            return await self._within(SERVER_TIMEOUT_S, call)
        except TimeoutError:
            late = (await self._first("laggards", generation=generation))["servers"]
        names = ", ".join(str(server) for server in late)
        raise unavailable(
            f"the engines have the change, API servers {names} have not taken it yet; ask again"
        )

    @staticmethod
    def _refuse_in_use(name: str, present: int) -> None:
        if present:
            raise AdminError(
                409,
                "ProfileInUseError",
                f"profile {name!r} has requests that run or wait; try again when they have ended",
            )

    async def _running(self, taken: State | None) -> dict[str, int]:
        """Requests that run or wait, by profile.

        Args:
            taken: what `_taken` returned, which is enough if there is one engine.
        """
        if taken is not None and self._alone:
            counted = taken["requests"]
        else:
            counted = (await self.status())["profiles"]
        return {name: counts["running"] + counts["waiting"] for name, counts in counted.items()}

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
        """The answer of one engine.

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
        """Wait for a call, but not forever; the call is never cancelled.

        Raises:
            TimeoutError: it took longer.
            Exception: what the call raises; or what killed the engines, which then answer nothing.
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
