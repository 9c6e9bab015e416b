"""Profiles in the engine core: which one a request gets, and changes to what is served.

All changes start at the first engine, one after another, which numbers them (`Served.generation`);
the others take a state with a higher number than their own. A change ends in one of two ways: it is
published, that is, offered to requests, after every engine has it; or it is undone, and the state
that was published last is back. So all engines end in the same state, even with two operators. Each
API server keeps one call open at the first engine (`follow`), which answers when there is news;
asking again tells that it was taken.

Calls arrive as `atomic_moe(verb, arguments)`, one at a time, in the core's own loop; the input
thread admits requests, and therefore reads one immutable state. Replies are plain data, like the
workers', or a Future of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.logger import init_logger

from vllm_atomic_moe.engine.attach import end_requests
from vllm_atomic_moe.engine.requests import Loaded, Served, argument_of, profile_of
from vllm_atomic_moe.engine.worker import NOT_OURS, RANK, Reply
from vllm_atomic_moe.experts.packing import SLOTS

logger = init_logger(f"vllm.{__name__}")

CORE = "atomic_moe"
VERBS = (
    *("describe", "status", "change", "apply", "publish", "undo"),
    *("follow", "taken", "laggards", "abort"),
)


class RefusedError(Exception):
    """A change that was refused; nothing was changed.

    Attributes:
        kind: stable name of the reason.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Follower:
    """An API server.

    Attributes:
        taken: generation of the last state that it has taken.
        held: profiles of its open HTTP requests.
        waiting: its open call, or None.
    """

    taken: int = -1
    held: list[str] = field(default_factory=list)
    waiting: Future[Reply] | None = None


class CoreProfiles:
    """The profiles of one engine core.

    Attributes:
        served: the state that its workers compute.
        published: the state that API servers offer; used at the first engine only.
        admitted: requests since the start, by profile.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._description = self._ranks("describe")[0]
        loaded = {
            name: Loaded(slot, **fields)
            for slot, (name, fields) in enumerate(self._description["profiles"].items())
        }
        self.served = self.published = Served(0, self._description["active"], loaded)
        self.admitted: Counter[str] = Counter()
        self._memory = self._ranks("memory")
        self._turn: str | None = None
        self._queue: deque[tuple[Future[Reply], tuple[Any, ...]]] = deque()
        self._followers: dict[int, Follower] = {}
        self._waiting: list[tuple[int, Future[Reply]]] = []

    def admit(self, request: Any) -> None:
        """Give one request its mark: its own, in the form that all API servers share; that of the
        profile that its arguments name; or that of the active profile.

        Args:
            request: vLLM's EngineCoreRequest.

        Raises:
            ValueError: its profile is not loaded.
        """
        served, given = self.served, request.lora_request
        params = request.sampling_params or request.pooling_params
        name = profile_of(given) if given else argument_of(params)
        if name is None:
            name = served.active
        if name not in served.loaded or (given and not served.holds(given)):
            raise ValueError(f"profile {name!r} is not loaded, or loaded from another file")
        request.lora_request = served.mark(name)
        self.admitted[name] += 1

    # --- calls ------------------------------------------------------------------------------------

    def describe(self) -> Reply:
        """What the workers described at start, and the served state."""
        return {**self._description, "served": self.published.plain()}

    def status(self) -> Reply:
        """The served state, requests by profile, and the memory of every rank."""
        served, requests = self.served.plain(), self._requests()
        return {"served": served, "requests": requests, "ranks": self._memory}

    def change(
        self, turn: str, verb: str, profile: str, publish: bool = False, **details: Any
    ) -> Reply | Future[Reply]:
        """Make and number a change at the first engine, after all earlier ones have ended.

        Args:
            turn: unique name of the change; `publish` or `undo` with it ends the change.
            verb: activate; load; withdraw (stop offering it); offer (again); free.
            profile: its name.
            publish: publish and end the change in the same call, as there is only one engine.
            details: arguments of the verb.
        """
        if self._turn is None:
            return self._make(turn, verb, profile, publish, details)
        answer: Future[Reply] = Future()
        self._queue.append((answer, (turn, verb, profile, publish, details)))
        return answer

    def _make(
        self, turn: str, verb: str, profile: str, publish: bool, details: Mapping[str, Any]
    ) -> Reply:
        before = self.served
        changed = getattr(self, f"_{verb}")(profile, **details)
        if changed != before:
            self._become(replace(changed, generation=before.generation + 1))
            self._turn = turn
        reply = {
            "served": self.served.plain(),
            "previous": before.active,
            "changed": changed != before,
        }
        if publish:
            self.publish(turn, self.served.plain())
        return reply

    def _next(self) -> None:
        """Make the changes that waited for their turn."""
        while self._turn is None and self._queue:
            answer, arguments = self._queue.popleft()
            answer.set_result(_answered(self._make, *arguments))

    def apply(self, served: Mapping[str, Any]) -> Reply:
        """Take another engine's state, if its generation is higher."""
        state = Served.of(served)
        if state.generation > self.served.generation:
            self._become(state)
        return {"served": self.served.plain()}

    def publish(self, turn: str, served: Mapping[str, Any]) -> Reply:
        """Tell API servers of a state that every engine has, which ends the change."""
        state = Served.of(served)
        if state.generation > self.published.generation:
            self.published = state
            for follower in self._followers.values():
                if follower.waiting is not None:
                    follower.waiting.set_result(self._news())
                    follower.waiting = None
        self._end(turn)
        return {}

    def undo(self, turn: str) -> Reply:
        """Take back a change that has not ended: return to what was published last."""
        if self._turn == turn:
            try:
                self._become(replace(self.published, generation=self.served.generation + 1))
            except RefusedError as error:  # the file of a freed profile is gone
                logger.error("Profiles: the change cannot be taken back: %s", error)
        self._queue = deque(item for item in self._queue if item[1][0] != turn)
        served = self.served.plain()
        if self._turn == turn:
            self.publish(turn, served)  # the next change may start here
        return {"served": served}

    def _end(self, turn: str) -> None:
        if self._turn == turn:
            self._turn = None
            self._next()

    def follow(self, server: int, taken: int, held: list[str]) -> Reply | Future[Reply]:
        """Answer an API server as soon as there is something new.

        Args:
            server: index of the API server.
            taken: generation of the state that it has.
            held: profiles of its open HTTP requests.
        """
        follower = self._followers.setdefault(server, Follower())
        follower.taken, follower.held = taken, held
        self._tell_waiting()
        if self.published.generation > taken:
            return self._news()
        follower.waiting = Future()
        return follower.waiting

    def taken(self, generation: int) -> Reply | Future[Reply]:
        """Answer when every API server has taken the state of this generation.

        The reply has the profiles of their HTTP requests at that time (`held`), and this engine's
        requests by profile.
        """
        answer: Future[Reply] = Future()
        self._waiting.append((generation, answer))
        self._tell_waiting()
        return answer

    def abort(self, profile: str) -> Reply:
        """End the requests of all other profiles, as vLLM ends those of a disconnected client."""
        requests = self._core.scheduler.requests.values()
        others = [request.request_id for request in requests if _name(request) != profile]
        return {"aborted": end_requests(self._core, others)}

    def laggards(self, generation: int) -> Reply:
        """Indices of the API servers that have not taken the state of this generation."""
        return {
            "servers": [
                server
                for server, follower in self._followers.items()
                if follower.taken < generation
            ]
        }

    # --- changes ----------------------------------------------------------------------------------

    def _activate(self, name: str) -> Served:
        if not self._there(name).offered:
            raise RefusedError(
                "ProfileNotLoadedError", f"profile {name!r} is being unloaded; try again"
            )
        return replace(self.served, active=name)

    def _load(self, name: str, digest: str, kept_atoms: int) -> Served:
        there = self.served.loaded.get(name)
        if there is not None:
            if there.digest != digest:
                raise RefusedError(
                    "ProfileChangedError",
                    f"profile {name!r} is loaded from another file; unload it first",
                )
            return self._offer(name)  # also one left by an interrupted unload
        taken = {profile.slot for profile in self.served.loaded.values()}
        free = [slot for slot in range(SLOTS) if slot not in taken]
        if not free:
            raise RefusedError(
                "NoFreeSlotError", f"all {SLOTS} slots are in use; unload a profile first"
            )
        return self._with(name, Loaded(free[0], digest, kept_atoms))

    def _withdraw(self, name: str) -> Served:
        there = self._there(name, "NotFoundError")
        if name == self.served.active:
            raise RefusedError(
                "ProfileActiveError",
                f"profile {name!r} is active; activate another one first",
            )
        if not there.offered:
            raise RefusedError("ProfileInUseError", f"profile {name!r} is being unloaded already")
        return self._with(name, replace(there, offered=False))

    def _offer(self, name: str) -> Served:
        return self._with(name, replace(self._there(name), offered=True))

    def _free(self, name: str) -> Served:
        if self._there(name).offered:
            raise RefusedError("ProfileInUseError", f"profile {name!r} is offered to requests")
        rest = {other: self.served.loaded[other] for other in self.served.loaded if other != name}
        return replace(self.served, loaded=rest)

    def _there(self, name: str, kind: str = "ProfileNotLoadedError") -> Loaded:
        there = self.served.loaded.get(name)
        if there is None:
            loaded = ", ".join(self.served.loaded)
            raise RefusedError(kind, f"profile {name!r} is not loaded, {loaded} are")
        return there

    def _requests(self) -> dict[str, dict[str, int]]:
        """Requests by profile: admitted since the start, running and waiting."""
        scheduler = self._core.scheduler
        running = Counter(map(_name, scheduler.running))
        present = Counter(map(_name, scheduler.requests.values()))
        return {
            name: {
                "admitted": self.admitted[name],
                "running": running[name],
                "waiting": present[name] - running[name],
            }
            for name in self.served.loaded
        }

    def _with(self, name: str, profile: Loaded) -> Served:
        return replace(self.served, loaded={**self.served.loaded, name: profile})

    def _become(self, state: Served) -> None:
        """Make the workers compute `state`, and admit requests by it.

        Raises:
            RefusedError: a worker cannot load a profile, or a profile to remove has requests;
                nothing was changed.
        """
        before, after = (
            {profile.slot: (name, profile.digest) for name, profile in served.loaded.items()}
            for served in (self.served, state)
        )
        fresh = {slot: after[slot] for slot in after if after[slot] != before.get(slot)}
        gone = before.keys() - after.keys()
        counts = self._requests()
        for slot in {slot for slot in before if before[slot] != after.get(slot)}:
            name = before[slot][0]
            if present := counts[name]["running"] + counts[name]["waiting"]:
                raise RefusedError(
                    "ProfileInUseError", f"profile {name!r} has {present} requests; try again"
                )
        try:
            for slot, (name, digest) in fresh.items():
                self._ranks("load", name=name, slot=slot, digest=digest)
        except RefusedError:
            for slot in fresh:
                self._ranks("free", slot=slot)
            for slot in fresh.keys() & before.keys():
                name, digest = before[slot]
                self._ranks("load", name=name, slot=slot, digest=digest)
            raise
        for slot in gone:
            self._ranks("free", slot=slot)
        if gone or fresh:
            self._memory = self._ranks("memory")
        self.served = state
        logger.info(
            "Profiles: generation %d, active %s, loaded %s",
            state.generation,
            state.active,
            ", ".join(state.loaded),
        )

    def _ranks(self, verb: str, **arguments: Any) -> list[Reply]:
        """The answer of every rank.

        Raises:
            RefusedError: a rank cannot do it.
        """
        replies = self._core.model_executor.collective_rpc(RANK, args=(verb, arguments))
        for index, reply in enumerate(replies):
            if not reply["ok"]:
                raise RefusedError("RankError", f"rank {index}: {reply['error']}")
        return replies

    def _news(self) -> Reply:
        return {"ok": True, "served": self.published.plain()}

    def _tell_waiting(self) -> None:
        held = sorted({name for follower in self._followers.values() for name in follower.held})
        for generation, answer in list(self._waiting):
            if not self.laggards(generation)["servers"]:
                self._waiting.remove((generation, answer))
                requests = self._requests()
                answer.set_result({"ok": True, "held": held, "requests": requests})


def _name(request: Any) -> str | None:
    return profile_of(request.lora_request)


def core_call(core: Any, verb: str, arguments: Mapping[str, Any]) -> Reply | Future[Reply]:
    """`atomic_moe` of vLLM's engine cores: answer one call; a refusal is also an answer."""
    profiles = getattr(core, "atomic_moe_profiles", None)
    if profiles is None:
        return {"ok": False, "kind": "EngineUnavailableError", "error": NOT_OURS}
    assert verb in VERBS, verb
    return _answered(getattr(profiles, verb), **arguments)


def _answered(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    try:
        reply = call(*given, **named)
    except RefusedError as error:
        return {"ok": False, "kind": error.kind, "error": str(error)}
    return reply if isinstance(reply, Future) else {"ok": True, **reply}
