"""The profile of a request: its mark, and the state of a process that admits requests.

A request's profile travels in vLLM's own `LoRARequest`, which all of vLLM's routes, queues and
block hashes know: its path has the profile's name and the digest of its masks, its id the slot. No
LoRA code runs. The process that admits a request adds the mark, the engine core makes it uniform
before it computes block hashes, and each worker removes it before its model runner sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

MARK = "atomic-profile:"
ARGUMENT = "profile"
"""Name of the extra argument that names a profile, in `vllm_xargs` and `extra_args`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A profile that the engines compute.

    Attributes:
        slot: its number in every layer's bits.
        digest: of its masks.
        kept_atoms: of all layers.
        offered: False while it is being unloaded: marked requests continue, new ones are refused.
    """

    slot: int
    digest: str
    kept_atoms: int
    offered: bool = True


@dataclass(frozen=True, slots=True)
class Served:
    """The state of a server, immutable and replaced as a whole.

    Attributes:
        generation: grows with every change; the higher of two states is valid.
        active: the profile of requests that do not name one.
        loaded: name -> profile.
    """

    generation: int
    active: str
    loaded: Mapping[str, Loaded]

    def plain(self) -> dict[str, Any]:
        """Plain data, for calls between processes."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Served:
        """The state that `plain()` described."""
        loaded = {name: Loaded(**fields) for name, fields in plain["loaded"].items()}
        return cls(plain["generation"], plain["active"], loaded)

    @property
    def offered(self) -> list[str]:
        """Names that requests may name."""
        return [name for name, profile in self.loaded.items() if profile.offered]

    def mark(self, name: str, shown: str | None = None) -> LoRARequest:
        """The mark of a request for a loaded profile.

        Args:
            name: of the profile.
            shown: the model's name in answers; block hashes must not contain it.
        """
        profile = self.loaded[name]
        path = f"{MARK}{name}:{profile.digest}"
        return LoRARequest(shown or path, profile.slot + 1, path)

    def holds(self, mark: LoRARequest) -> bool:
        """Whether the profile of a mark is loaded, from the same file."""
        name = profile_of(mark)
        if name is None or name not in self.loaded:
            return False
        return self.mark(name).lora_path == mark.lora_path

    def named(self, name: Any) -> str:
        """`name`, if requests may name it.

        Raises:
            VLLMValidationError: it is not a string.
            VLLMNotFoundError: no such profile is loaded.
        """
        if not isinstance(name, str):
            raise VLLMValidationError(
                f"`{ARGUMENT}` is {str(name)[:80]}, wanted the name of a profile",
                parameter="vllm_xargs",
            )
        if name not in self.offered:
            raise VLLMNotFoundError(
                f"The profile `{name[:80]}` is not loaded. Loaded are: {', '.join(self.offered)}."
            )
        return name


def profile_of(mark: LoRARequest | None) -> str | None:
    """The profile that a mark names; None if it is not one of ours."""
    if mark is None or not mark.lora_path.startswith(MARK):
        return None
    return mark.lora_path.removeprefix(MARK).rpartition(":")[0]


def slot_of(mark: LoRARequest) -> int:
    """The slot that a mark names."""
    return mark.lora_int_id - 1


def argument_of(params: Any) -> Any:
    """The profile that extra arguments of sampling or pooling parameters name, or None."""
    extra = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}
    return extra.get(ARGUMENT)


class Admission:
    """Marks the requests that one process admits.

    Attributes:
        served: the last state that this process knows.
    """

    def __init__(self, served: Served) -> None:
        self.served = served

    def mark_for(self, given: LoRARequest | None, params: Any) -> LoRARequest | None:
        """The mark of one request of the engine.

        Args:
            given: `lora_request` as the caller of vLLM's engine passed it; kept if present.
            params: sampling or pooling parameters, which may name a profile.

        Raises:
            VLLMValidationError: as `Served.named`.
            VLLMNotFoundError: as `Served.named`; or the profile of a mark is no longer loaded.
        """
        if given is not None:
            if (marked := profile_of(given)) is not None and not self.served.holds(given):
                raise VLLMNotFoundError(f"The profile `{marked}` is not loaded any more.")
            return given
        wanted = argument_of(params)
        name = self.served.active if wanted is None else self.served.named(wanted)
        return self.served.mark(name)

    def admitted(self, profile: str) -> None:
        """Called for every accepted request, before vLLM fans it out."""
