"""The admin endpoint: which profile answers, and another one.

An endpoint plug-in of vLLM's, loaded where `VLLM_PLUGINS` names `atomic_moe_admin`. It holds no
state that matters: the workers do, so that any number of API servers may stand before the engine.
"""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.security import HTTPBearer
from vllm.logger import init_logger

from vllm_atomic_moe.control.access import (
    Access,
    AdminRoute,
    audit,
)
from vllm_atomic_moe.control.key import fingerprint, read_key
from vllm_atomic_moe.control.metrics import switch_metrics
from vllm_atomic_moe.control.models import (
    ErrorResponse,
    Memory,
    Profiles,
    ProfileWidths,
    Status,
    SwitchAnswer,
    SwitchRequest,
)
from vllm_atomic_moe.engine.attach import vllm_health
from vllm_atomic_moe.engine.switch import (
    ProfileSwitcher,
    SwitchError,
    engine_unavailable,
)

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

logger = init_logger(f"vllm.{__name__}")

PREFIX = "/atomic/v1"
REASONS = {
    400: "Bad request.",
    401: "The admin key is missing or wrong.",
    403: "No admin key is configured.",
    404: "Unknown profile.",
    409: "Another switch is under way, the engine is paused by somebody else, or the profile is "
    "not resident.",
    503: "The time ran out, the switch failed, or there is no engine; `type` says which.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": REASONS[status]} for status in statuses}


router = APIRouter(
    prefix=PREFIX,
    tags=["atomic-moe"],
    route_class=AdminRoute,
    # For the documentation; the route class has checked before.
    dependencies=[Depends(HTTPBearer(auto_error=False, description="The admin key."))],
    responses=_errors(401, 403, 503),
)
ProfilePath = Annotated[str, Path(description="Name of a profile.", examples=["heapr-25"])]


def _switcher(request: Request) -> ProfileSwitcher:
    """The switcher of this server.

    Raises:
        SwitchError: 503, a render server has no engine.
    """
    switcher = request.app.state.atomic_moe_switcher
    if switcher is None:
        raise engine_unavailable("this server has no engine: it renders only")
    return switcher


@router.get("/status", summary="What answers requests now")
async def get_status(request: Request) -> Status:
    """The active profile, the state of the switch, and the memory of the experts."""
    status = await _switcher(request).status()
    return Status(**status, memory=Memory(**status))


@router.get("/profiles", summary="All profiles the server knows")
async def get_profiles(request: Request) -> Profiles:
    """Every valid profile of the server's directory, resident or not."""
    return Profiles.model_validate({"profiles": await _switcher(request).profiles()})


@router.get("/profiles/{name}", summary="One profile", responses=_errors(404))
async def get_profile(request: Request, name: ProfilePath) -> ProfileWidths:
    """One profile, with the kept width of every expert of every layer."""
    return ProfileWidths(**await _switcher(request).profile(name))


@router.put("/active", summary="Switch the profile", responses=_errors(400, 404, 409))
async def put_active(request: Request, wanted: SwitchRequest) -> SwitchAnswer:
    """Make a resident profile the one that answers requests.

    It is all or nothing: no answer mixes two profiles, nor does the prefix cache. The switch goes
    on if the client goes away. The profile that is active already is no error, and no work.
    """
    switcher = _switcher(request)
    result = await switcher.switch(wanted.profile, wanted.mode, wanted.timeout_s)
    record = result.record
    with suppress(SwitchError):  # it is done, whatever the engine says afterwards
        switch_metrics().show(await switcher.status())
    audit(request, "switched" if record else "unchanged", 200, record, result.active)
    return SwitchAnswer(
        active=result.active,
        previous=result.previous,
        generation=result.generation,
        drain_ms=record.drain_ms if record else 0.0,
        commit_ms=record.commit_ms if record else 0.0,
        total_ms=record.total_ms if record else 0.0,
    )


async def health(request: Request) -> Response:
    """Health check: 503 also where a switch has failed and left the engine paused."""
    answer = await vllm_health(request)
    switcher = request.app.state.atomic_moe_switcher
    if answer.status_code != 200 or switcher is None:
        return answer
    return Response(status_code=503 if switcher.has_failed() else 200)


def _document_no_422(app: FastAPI) -> None:
    """FastAPI documents 422 for whatever it validates; like vLLM's, these routes answer 400."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe()
        for path, operations in description["paths"].items():
            if path.startswith(PREFIX):
                for operation in operations.values():
                    operation["responses"].pop("422", None)
        return description

    app.openapi = openapi  # type: ignore[method-assign]


class AdminPlugin:
    """Entry point `atomic_moe_admin` of `vllm.endpoint_plugins`."""

    name = "atomic_moe_admin"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; `/health` learns of failed switches.

        Raises:
            ValueError: the admin key cannot be read, or equals a serving key.
        """
        serving_keys = [*(app.state.args.api_key or ()), os.environ.get("VLLM_API_KEY")]
        try:
            key = read_key()
            app.state.atomic_moe_access = Access(key, serving_keys)
        except ValueError as error:
            logger.error("atomic-moe admin: %s", error)
            raise
        logger.info("Admin endpoint: key=%s", fingerprint(key))
        app.state.atomic_moe_switcher = None
        app.include_router(router)
        _document_no_422(app)
        app.add_api_route("/health", health, methods=["GET"], response_class=Response)
        # First, also before routers that vLLM's plug-in interface does not see through.
        app.router.routes.insert(0, app.router.routes.pop())

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Connect the routes with the engine, if there is one, and tell it what it serves."""
        if engine_client is None:
            return
        state.atomic_moe_switcher = switcher = ProfileSwitcher(engine_client)
        try:
            await switcher.announce()
            switch_metrics().show(await switcher.status())
        except (SwitchError, TimeoutError) as error:
            logger.error("atomic-moe admin: profiles cannot be switched: %s", error)
