"""The admin endpoint: which profile requests get, and which profiles are loaded.

An endpoint plug-in of vLLM, loaded if `VLLM_PLUGINS` names `atomic_moe_admin`. The state is in the
engines, so that any number of API servers can share them.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.security import HTTPBearer
from vllm.logger import init_logger

from vllm_atomic_moe.control import page
from vllm_atomic_moe.control.access import Access, AdminRoute, audit
from vllm_atomic_moe.control.errors import Outcome, unavailable
from vllm_atomic_moe.control.key import fingerprint, read_key
from vllm_atomic_moe.control.models import (
    ActiveAnswer,
    ActiveRequest,
    ErrorResponse,
    LoadAnswer,
    Profiles,
    ProfileWidths,
    Status,
    UnloadAnswer,
)

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

    from vllm_atomic_moe.control.changes import Changes

logger = init_logger(f"vllm.{__name__}")

PREFIX = "/atomic/v1"
REASONS = {
    400: "Bad request.",
    401: "The admin key is missing or wrong.",
    403: "No admin key is configured.",
    404: "Unknown profile.",
    409: "It cannot be done in the present state; `type` says why.",
    503: "No engine runs, or an engine or API server does not answer; the message names it.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": REASONS[status]} for status in statuses}


router = APIRouter(
    prefix=PREFIX,
    tags=["atomic-moe"],
    route_class=AdminRoute,
    # For the API's documentation only: the route class has checked the key already.
    dependencies=[Depends(HTTPBearer(auto_error=False, description="The admin key."))],
    responses=_errors(401, 403, 503),
)
ProfilePath = Annotated[str, Path(description="Name of a profile.", examples=["heapr-25"])]


def _changes(request: Request) -> Changes:
    """The engines' side of this server.

    Raises:
        AdminError: 503, this is a render server without an engine, or the model is not pruned.
    """
    changes = request.app.state.atomic_moe_changes
    if changes is None:
        raise unavailable("this server has no engine that runs with --load-format atomic-pruned")
    return changes


@router.get("/status", summary="What is served now")
async def get_status(request: Request) -> Status:
    """The active profile, the requests of every loaded one, and the memory of the experts."""
    return Status.model_validate(await _changes(request).status())


@router.get("/profiles", summary="All profiles of the server's directory")
async def get_profiles(request: Request) -> Profiles:
    """Every valid profile, loaded or not, read from the files now."""
    return Profiles.model_validate({"profiles": await _changes(request).profiles()})


@router.get("/profiles/{name}", summary="One profile", responses=_errors(404, 409))
async def get_profile(request: Request, name: ProfilePath) -> ProfileWidths:
    """One profile, with the kept width of every expert of every layer."""
    return ProfileWidths.model_validate(await _changes(request).profile(name))


@router.put("/active", summary="Change the active profile", responses=_errors(400, 404, 409))
async def put_active(request: Request, wanted: ActiveRequest) -> ActiveAnswer:
    """Change the profile of requests that do not name one, from now on.

    Nothing waits and no cache is emptied: requests in the engine keep their profile. Naming the
    profile that is already active changes nothing and is not an error.
    """
    running = wanted.running
    if wanted.mode is not None or wanted.timeout_s is not None:
        logger.warning(
            "Admin endpoint: `mode` and `timeout_s` belong to version 0.1 and the next version "
            "refuses them; `mode` is now `running`, `wait` is `finish`, nothing has to drain"
        )
        running = "abort" if wanted.mode == "abort" else running
    answer = await _changes(request).activate(wanted.profile, running)
    unchanged = answer["previous"] == answer["active"]
    audit(request, "unchanged" if unchanged else "changed", 200, _told(answer))
    return ActiveAnswer.model_validate(answer)


@router.put("/profiles/{name}", summary="Load a profile", responses=_errors(404, 409))
async def put_profile(request: Request, name: ProfilePath) -> LoadAnswer:
    """Load a profile of the server's directory while serving; its atoms must be in memory.

    Loading a profile again changes nothing and is not an error.
    """
    answer = await _changes(request).load(name)
    outcome: Outcome = "changed" if answer.pop("changed") else "unchanged"
    audit(request, outcome, 200, f"loaded {name} generation={answer['generation']}")
    return LoadAnswer.model_validate(answer)


@router.delete("/profiles/{name}", summary="Unload a profile", responses=_errors(404, 409))
async def delete_profile(request: Request, name: ProfilePath) -> UnloadAnswer:
    """Withdraw a profile's name and free its slot. No request may use it."""
    answer = await _changes(request).unload(name)
    audit(request, "changed", 200, f"unloaded {name} generation={answer['generation']}")
    return UnloadAnswer.model_validate(answer)


def _told(answer: dict[str, Any]) -> str:
    return f"{answer['previous']}->{answer['active']} generation={answer['generation']}"


def _document_no_422(app: FastAPI) -> None:
    """Replace the 422 that FastAPI documents by 400, which these routes answer, like vLLM's."""
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
        """Add the routes and the page.

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
        app.state.atomic_moe_changes = None
        app.include_router(router)
        app.include_router(page.router)
        _document_no_422(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Connect the routes with the engines, if they serve a pruned model."""
        models = getattr(state, "openai_serving_models", None)
        profiles = getattr(models, "atomic_moe_profiles", None)
        if profiles is not None:
            state.atomic_moe_changes = profiles.changes
