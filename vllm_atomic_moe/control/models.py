"""Requests and answers of the admin endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_atomic_moe.files.plain_files import NAME

ProfileName = Annotated[
    str, Field(pattern=f"^{NAME.pattern}$", max_length=64, examples=["heapr-25"])
]
Running = Literal["finish", "abort"]


class ActiveRequest(BaseModel):
    """From now on, the profile of requests that do not name one."""

    model_config = ConfigDict(extra="forbid")

    profile: ProfileName = Field(description="Name of a loaded profile, or `dense`.")
    running: Running = Field(
        "finish",
        description="What happens to running requests: `finish` lets them end with the profile "
        "that they have; `abort` ends those of all other profiles.",
    )
    mode: Literal["wait", "abort"] | None = Field(
        None, deprecated=True, description="Name of `running` in version 0.1; `wait` is `finish`."
    )
    timeout_s: float | None = Field(
        None, deprecated=True, description="Ignored: nothing has to drain since version 0.2."
    )


class ActiveAnswer(BaseModel):
    """Requests that arrive from now on, at any API server, get the new profile."""

    active: str = Field(description="The profile of requests that do not name one.")
    previous: str = Field(description="The one before; the same if nothing had to change.")
    generation: int = Field(description="Grows with every change.")
    running: dict[str, int] = Field(description="Requests that run or wait, by profile.")


class LoadAnswer(BaseModel):
    """A profile that requests may name from now on."""

    profile: str
    slot: int = Field(description="The number under which it is computed.")
    generation: int = Field(description="Grows with every change.")


class UnloadAnswer(BaseModel):
    """A profile that is no longer loaded."""

    profile: str
    generation: int = Field(description="Grows with every change.")


class Memory(BaseModel):
    """Bytes of routed-expert weights in the serving dtype, summed over all ranks."""

    dense_bytes: int = Field(description="All atoms of the model.")
    resident_bytes: int = Field(description="Allocated, padding included.")
    active_bytes: int = Field(description="Atoms that the active profile keeps.")
    index_bytes: int = Field(description="Index structures of all slots.")
    rank_resident_bytes: list[int] = Field(description="`resident_bytes`, rank by rank.")


class ProfileRequests(BaseModel):
    """A loaded profile, and its requests on all engines."""

    slot: int = Field(description="The number under which it is computed.")
    running: int = Field(description="Requests that are being computed.")
    waiting: int = Field(description="Requests that wait for their turn.")
    admitted: int = Field(description="Requests since the start.")


class Status(BaseModel):
    """What the server serves."""

    active: str = Field(description="The profile of requests that do not name one.")
    generation: int = Field(description="Grows with every change.")
    agreed: bool = Field(description="Whether all engines say the same.")
    engines: int = Field(description="Number of engines: data parallel ranks behind this server.")
    profiles: dict[str, ProfileRequests] = Field(description="The loaded profiles.")
    memory: Memory


class Profile(BaseModel):
    """One profile of the server's directory, or `dense`."""

    name: str
    method: str = Field(description="How it was made, if its file says so.")
    kept: float = Field(description="Fraction of atoms kept.")
    bytes: int = Field(description="Bytes of those atoms in the serving dtype.")
    loaded: bool = Field(description="Requests may name it.")
    servable: bool = Field(description="All of its atoms are in memory: it may be loaded.")
    active: bool = Field(description="Requests that do not name a profile get it.")


class ProfileWidths(Profile):
    """One profile, layer by layer."""

    widths: dict[str, list[int]] = Field(
        description="Decoder layer index -> kept width of every expert."
    )
    live_tiles: float | None = Field(
        description="Fraction of the tiles of 32 atoms in memory that it computes, which its time "
        "follows; null where it is not loaded."
    )


class Profiles(BaseModel):
    """Every valid profile of the server's directory as it is now, and `dense`."""

    profiles: list[Profile]


class ErrorInfo(BaseModel):
    """As vLLM's."""

    message: str
    type: str = Field(description="Stable name of the reason.")
    param: str | None = None
    code: int = Field(description="The HTTP status.")


class ErrorResponse(BaseModel):
    """As vLLM's."""

    error: ErrorInfo
