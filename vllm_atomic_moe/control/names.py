"""One API server's view: the profiles by their model names, and the profile of a request.

`ALIAS:PROFILE` is listed, found and answered like a vLLM LoRA adapter. A request is resolved once,
when its route checks the model's name; everything it becomes in the engine has that profile.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from vllm_atomic_moe.control.changes import Changes
from vllm_atomic_moe.control.errors import AdminError
from vllm_atomic_moe.control.metrics import profile_metrics
from vllm_atomic_moe.engine.attach import call_engine, engines_of, server_index
from vllm_atomic_moe.engine.requests import ARGUMENT, Admission, Served, argument_of, profile_of

logger = init_logger(f"vllm.{__name__}")

HEADER = "x-atomic-moe-profile"
SEPARATOR = ":"
METRICS_EVERY_S = 2.0
RETRY_S = 1.0


class HttpRequest:
    """The profile to which one HTTP request was resolved.

    Attributes:
        profile: the profile that answers, once known.
        marks: the name in the request -> the mark of everything in it.
    """

    def __init__(self) -> None:
        self.profile: str | None = None
        self.marks: dict[Any, LoRARequest] = {}
        self._held: list[tuple[Counter[str], str]] = []

    def hold(self, held: Counter[str], profile: str) -> None:
        """Count the profile as in use until the request is answered."""
        held[profile] += 1
        self._held.append((held, profile))

    def end(self) -> None:
        """End the use: the request is answered, or its client is gone."""
        for held, profile in self._held:
            held[profile] -= 1


_current: ContextVar[HttpRequest | None] = ContextVar("atomic_moe_http_request", default=None)


class ProfileHeader:
    """ASGI middleware: a header of every answer names the profile that answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = HttpRequest()
        token = _current.set(request)

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and request.profile is not None:
                MutableHeaders(scope=message).append(HEADER, request.profile)
            await send(message)

        try:
            await self._app(scope, receive, send_with_header)
        finally:
            request.end()
            _current.reset(token)


class ServerProfiles(Admission):
    """The profiles that one API server offers.

    Attributes:
        changes: asks the engines, and changes what they serve.
    """

    changes: Changes
    _tasks: tuple[asyncio.Task[None], ...]

    def __init__(self, models: Any, description: Mapping[str, Any]) -> None:
        """List the profiles among the models.

        Args:
            models: vLLM's OpenAIServingModels.
            description: of `CoreProfiles.describe`.
        """
        super().__init__(Served.of(description["served"]))
        self._models = models
        self._held: Counter[str] = Counter()
        self._list_models()

    @classmethod
    async def start(cls, models: Any) -> ServerProfiles:
        """Ask the engine what it serves, and follow its changes.

        Raises:
            ValueError: the engine does not serve a pruned model.
        """
        client = models.engine_client
        description = await call_engine(client, engines_of(client)[0], "describe", {})
        if not description["ok"]:
            raise ValueError(description["error"])
        profiles = cls(models, description)
        profiles.changes = Changes(client, profiles, description)
        tasks = [profiles._follow(client)]
        if server_index(client) == 0:
            tasks.append(profiles._show_metrics())
        profiles._tasks = tuple(map(asyncio.create_task, tasks))
        return profiles

    async def _follow(self, client: Any) -> None:
        """Take news as soon as there is some; asking again tells that it was taken."""
        first, server = engines_of(client)[0], server_index(client)
        while True:
            known = {
                "server": server,
                "taken": self.served.generation,
                "held": [name for name, requests in self._held.items() if requests],
            }
            try:
                reply = await call_engine(client, first, "follow", known)
                self.served = Served.of(reply["served"])
                self._list_models()
            except Exception as error:
                if client.errored:  # the engine is dead, and so will this server be
                    return
                logger.error("Profiles: changes do not arrive: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _show_metrics(self) -> None:
        """Keep the gauges fresh. All API servers share them, so the first one sets them."""
        while True:
            try:
                profile_metrics().show(await self.changes.status())
            except AdminError as error:
                logger.debug("Profiles: metrics are not fresh: %s", error)
            await asyncio.sleep(METRICS_EVERY_S)

    def _list_models(self) -> None:
        listed = self._models.lora_requests
        for name in [name for name, mark in listed.items() if profile_of(mark) is not None]:
            del listed[name]
        for base in self._models.base_model_paths:
            for profile in self.served.offered:
                name = f"{base.name}{SEPARATOR}{profile}"
                mark = self.served.mark(profile, shown=name)
                mark.base_model_name = base.name
                listed[name] = mark

    def admitted(self, profile: str) -> None:
        """See `Admission`: counts the request."""
        profile_metrics().count_request(profile)

    def known(self, request: Any) -> LoRARequest | None:
        """The mark that a request of this HTTP request was given before, or None."""
        http = _current.get()
        return http.marks.get(str(_named_by(request))) if http is not None else None

    def resolve(self, request: Any) -> LoRARequest:
        """The mark of one API request, after vLLM has checked its model name.

        Raises:
            VLLMValidationError: it names two profiles, or its name is not a string.
            VLLMNotFoundError: its extra arguments name a profile that is not loaded.
        """
        if (known := self.known(request)) is not None:
            return known
        model, argument = _named_by(request)
        by_model = profile_of(self._models.lora_requests.get(model))
        if argument is not None:
            argument = self.served.named(argument)
            if by_model not in (None, argument):
                raise VLLMValidationError(
                    f"`model` names the profile `{by_model}`, `vllm_xargs.{ARGUMENT}` names "
                    f"`{argument}`; name one",
                    parameter="vllm_xargs",
                )
        profile = argument or by_model or self.served.active
        shown = model if by_model or self._models.is_base_model(model) else None
        mark = self.served.mark(profile, shown or self._models.model_name())
        http = _current.get()
        if http is not None:
            http.marks[str((model, argument))] = mark
            http.profile = profile
            http.hold(self._held, profile)
        return mark


def _named_by(request: Any) -> tuple[str, Any]:
    """The model and the profile that a request names."""
    extra = getattr(request, "vllm_xargs", None)
    argument = extra.get(ARGUMENT) if isinstance(extra, dict) else None
    if argument is None:
        argument = argument_of(getattr(request, "sampling_params", None))
    return getattr(request, "model", None) or "", argument
