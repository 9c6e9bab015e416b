"""Requests and answers of the admin endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_atomic_moe.engine import Mode
from vllm_atomic_moe.files.profiles import NAME

TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 3600.0

ProfileName = Annotated[
    str, Field(pattern=f"^{NAME.pattern}$", max_length=64, examples=["heapr-25"])
]


class SwitchRequest(BaseModel):
    """Which profile is to answer requests from now on."""

    model_config = ConfigDict(extra="forbid")

    profile: ProfileName = Field(description="Name of a resident profile, or `dense`.")
    mode: Mode = Field(
        "wait",
        description="What becomes of requests that are there: `wait` lets those that have begun "
        "finish, queued ones are answered by the new profile; `abort` ends all of them.",
    )
    timeout_s: float = Field(
        TIMEOUT_S,
        gt=0,
        le=LONGEST_TIMEOUT_S,
        allow_inf_nan=False,
        description="Seconds that draining may take; after them nothing has changed.",
    )


class SwitchAnswer(BaseModel):
    """A switch that is done: no answer that began before it is under way any more."""

    active: str = Field(description="The profile that answers requests now.")
    previous: str = Field(description="The one before; the same where nothing had to change.")
    generation: int = Field(description="Number of switches since the start.")
    drain_ms: float = Field(description="Milliseconds until no request was running.")
    commit_ms: float = Field(description="Milliseconds of the change itself, on all ranks.")
    total_ms: float = Field(description="Milliseconds from taking the switch to serving again.")


class LastSwitch(BaseModel):
    """The last switch that began."""

    profile: str = Field(description="What was asked for.")
    previous: str = Field(description="What was active before.")
    mode: Mode
    outcome: Literal["switched", "timeout", "rolled_back", "failed"]
    error: str | None = Field(description="Why it did not switch.")
    finished_at: float = Field(description="Seconds since the epoch.")
    drain_ms: float
    commit_ms: float
    total_ms: float


class Memory(BaseModel):
    """Bytes of routed-expert weights in the serving dtype, summed over all ranks."""

    dense_bytes: int = Field(description="All atoms of the model.")
    resident_bytes: int = Field(description="Allocated, padding included.")
    active_bytes: int = Field(description="Atoms that the active profile keeps.")
    index_bytes: int = Field(description="Index structures of all resident profiles.")
    rank_resident_bytes: list[int] = Field(description="`resident_bytes`, rank by rank.")


class Status(BaseModel):
    """What the server serves now."""

    active: str = Field(description="The profile that answers requests.")
    generation: int = Field(description="Number of switches since the start.")
    state: Literal["serving", "switching", "failed"] = Field(
        description="`failed`: a switch could neither finish nor go back, and the engine is "
        "paused; or the ranks disagree on what is active."
    )
    failure: str | None = Field(description="Why, if `failed`.")
    resident: list[str] = Field(description="Profiles held in memory.")
    memory: Memory
    last_switch: LastSwitch | None


class Profile(BaseModel):
    """One profile the server knows."""

    name: str
    method: str = Field(description="How it was made, if its file says so.")
    kept: float = Field(description="Fraction of atoms kept.")
    bytes: int = Field(description="Bytes of those atoms in the serving dtype.")
    resident: bool = Field(description="Held in memory: may be made active.")
    active: bool = Field(description="Answers requests now.")


class ProfileWidths(Profile):
    """One profile, layer by layer."""

    widths: dict[str, list[int]] = Field(
        description="Decoder layer index -> kept width of every expert."
    )


class Profiles(BaseModel):
    """Every valid profile of the server's directory, as it was when the server started."""

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
