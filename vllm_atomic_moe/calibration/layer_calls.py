"""How a model calls its decoder layers, so that each can be called alone.

The model runs once with stubs for its layers, which record their arguments: the hidden state;
tensors that do not depend on the layers (masks, rotary embeddings); and results of earlier layers,
as further outputs (top-k indices) or entries of a dictionary that layers share (Gemma's keys and
values). A layer's inputs and outputs have names here: `hidden`, `output.N`, and the place in a
dictionary. A model that computes anything between its layers is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_atomic_moe.calibration.passes import CannotStreamError, model_inputs
from vllm_atomic_moe.files.plain_files import one_line

HIDDEN = "hidden"
# What a decoder layer may return: a bare hidden state, or one with so many further outputs.
EXTRAS = (None, 0, 1, 2, 3)
CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, type(None))

Tensors = dict[str, torch.Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Given:
    """Placeholder in arguments for the output of the layer below."""

    name: str


@dataclass(frozen=True, slots=True)
class Shared:
    """Placeholder in arguments for a dictionary that layers read and write."""

    place: str
    kind: Callable[[], MutableMapping[Any, Any]]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The call of one decoder layer for one batch.

    Attributes:
        arguments: positional and keyword arguments, with `Given` and `Shared` in them.
        extras: see EXTRAS.
        takes: names of its inputs, without entries of dictionaries.
    """

    arguments: Arguments
    extras: int | None
    takes: frozenset[str]

    def run(self, block: nn.Module, given: Mapping[str, torch.Tensor]) -> Tensors:
        """Call the layer.

        Args:
            block: the layer.
            given: the inputs named by `takes`, except those that are None; and all entries of
                dictionaries so far. Layers may write into it.

        Returns:
            The hidden state, further outputs that are not None, and all entries of dictionaries.

        Raises:
            CannotStreamError: the layer returns or shares something unexpected.
        """
        dictionaries: dict[str, MutableMapping[Any, Any]] = {}

        def put_in(value: Any, place: str) -> Any:
            if isinstance(value, Given):
                return given.get(value.name)
            if isinstance(value, Shared):
                return dictionaries.setdefault(place, _filled(value, given))
            return value

        args, kwargs = _mapped(self.arguments, put_in)
        answer = block(*args, **kwargs)
        wanted = "a tensor" if self.extras is None else f"a tuple of {1 + self.extras} or more"
        bare = isinstance(answer, torch.Tensor)
        if bare != (self.extras is None) or (not bare and len(answer) <= (self.extras or 0)):
            raise CannotStreamError(
                f"{type(block).__name__} returns {type(answer).__name__} where {wanted} is used"
            )
        # Entries go to the layers above even if this one does not get their dictionary.
        made = {name: tensor for name, tensor in given.items() if is_entry(name)}
        outputs = zip(_names(self.extras), (answer,) if bare else answer, strict=False)
        made |= {name: output for name, output in outputs if output is not None}
        for place, dictionary in dictionaries.items():
            made |= _flattened(type(block).__name__, place, dictionary)
        return made


@dataclass(slots=True)
class CallRecorder:
    """Records how a model calls its layers, batch after batch.

    Equal arguments of consecutive batches are stored once.

    Attributes:
        possible: what the layers may return, see EXTRAS; after the first batch the one that fits.
    """

    possible: tuple[int | None, ...] = EXTRAS
    _latest: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def record(
        self, model: PreTrainedModel, blocks: nn.ModuleList, ids: torch.Tensor
    ) -> tuple[list[LayerCall], torch.Tensor]:
        """The calls of one batch, and the first layer's hidden state.

        Args:
            model: has everything but the layers' weights.
            blocks: its layers.
            ids: int32 [windows, seq_len].

        Raises:
            CannotStreamError: the model computes between its layers, or passes values that cannot
                be carried.
        """
        reason = ""
        for extras in self.possible:
            stubs = [_Stub(extras) for _ in blocks]
            try:
                with replaced(blocks, [stub.forward for stub in stubs]):
                    model.base_model(**model_inputs(model, ids))
            except Exception as error:  # of a model that takes another kind of answer
                if extras is None:
                    reason = f" ({one_line(error)})"
                continue
            if all(map(_hands_over, stubs, [*stubs[1:], None])):
                self.possible = (extras,)
                owner = type(model).__name__
                calls = [self._call(owner, index, stubs) for index in range(len(stubs))]
                return calls, stubs[0].hidden
        raise CannotStreamError(f"{type(model).__name__} computes between its layers{reason}")

    def _call(self, owner: str, index: int, stubs: list[_Stub]) -> LayerCall:
        stub = stubs[index]
        below = stubs[index - 1].made if index else ()
        takes = {HIDDEN}
        held: dict[int, torch.Tensor] = {}

        def note(value: Any, place: str) -> Any:
            if value is stub.hidden:
                return Given(HIDDEN)
            if isinstance(value, torch.Tensor):
                for name, made in zip(_names(len(below))[1:], below, strict=True):
                    if value is made:
                        takes.add(name)
                        return Given(name)
                if value.is_meta:
                    raise CannotStreamError(
                        f"{owner} gives a layer what another one far below it made ({place})"
                    )
                if id(value) not in held:
                    held[id(value)] = self._held((index, len(held)), value)
                return held[id(value)]
            if isinstance(value, MutableMapping) and not value:
                return Shared(place, type(value))
            if isinstance(value, CONSTANTS):
                return value
            raise CannotStreamError(f"{owner} gives its layers {type(value).__name__} ({place})")

        return LayerCall(_mapped(stub.arguments, note), stub.extras, frozenset(takes))

    def _held(self, key: tuple[int, int], value: torch.Tensor) -> torch.Tensor:
        latest = self._latest.get(key)
        alike = latest is not None and (latest.shape, latest.dtype) == (value.shape, value.dtype)
        if latest is None or not alike or not torch.equal(latest, value):
            latest = self._latest[key] = value
        return latest


@contextmanager
def replaced(blocks: nn.ModuleList, forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Within the context, decoder layers compute something else."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def is_entry(name: str) -> bool:
    """Whether a name is an entry of a shared dictionary."""
    return name.startswith("[")


def ending_in(hidden: torch.Tensor, extras: int | None, layers: int) -> list[Callable[..., Any]]:
    """Forwards of all layers: the last returns `hidden`, the others their input."""
    last = _Stub(extras)
    others = [_Stub(extras).forward for _ in range(layers - 1)]
    return [*others, lambda *args, **kwargs: last.answer(hidden)]


class _Stub:
    """Replaces a decoder layer: records its arguments and passes the hidden state on."""

    arguments: Arguments
    hidden: torch.Tensor

    def __init__(self, extras: int | None) -> None:
        self.extras = extras
        self.calls = 0
        # Without data, since the model only passes them on. Distinguished by identity.
        self.made = tuple(torch.empty(0, device="meta") for _ in range(extras or 0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.arguments = (args, kwargs)
        self.hidden = args[0] if args else kwargs["hidden_states"]
        return self.answer(self.hidden)

    def answer(self, hidden: torch.Tensor) -> Any:
        return hidden if self.extras is None else (hidden, *self.made)


def _hands_over(stub: _Stub, following: _Stub | None) -> bool:
    """Whether the layer was called once, and the next got its hidden state unchanged."""
    if stub.calls != 1:
        return False
    return following is None or (following.calls == 1 and following.hidden is stub.hidden)


def _names(extras: int | None) -> list[str]:
    return [HIDDEN, *(f"output.{number}" for number in range(extras or 0))]


def _mapped(arguments: Arguments, leaf: Callable[[Any, str], Any]) -> Arguments:
    """Arguments with every leaf replaced; the function gets the name of the leaf's argument."""

    def walk(value: Any, place: str) -> Any:
        if type(value) in (tuple, list):
            return type(value)(walk(item, place) for item in value)
        if isinstance(value, Mapping) and value:
            # Read only: what a layer wrote would not reach the layers above.
            return MappingProxyType({key: walk(item, place) for key, item in value.items()})
        return leaf(value, place)

    args, kwargs = arguments
    positional = tuple(walk(value, str(number)) for number, value in enumerate(args))
    return positional, {name: walk(value, name) for name, value in kwargs.items()}


def _filled(shared: Shared, given: Mapping[str, torch.Tensor]) -> MutableMapping[Any, Any]:
    """The dictionary of an argument, from the result of `_flattened`."""
    dictionary = shared.kind()
    for name, tensor in given.items():
        if not is_entry(name):
            continue
        place, key, *index = json.loads(name)
        if place == shared.place:
            dictionary[key] = (*dictionary.get(key, ()), tensor) if index else tensor
    return dictionary


def _flattened(owner: str, place: str, dictionary: Mapping[Any, Any]) -> Tensors:
    """Name -> tensor, of a dictionary of tensors and tuples of them; in order."""
    found: Tensors = {}
    for key, value in dictionary.items():
        several = isinstance(value, tuple)
        parts = value if several else (value,)
        if not isinstance(key, str | int) or not all(isinstance(x, torch.Tensor) for x in parts):
            raise CannotStreamError(f"{owner} puts {type(value).__name__} into {place}")
        for number, tensor in enumerate(parts):
            found[json.dumps([place, key, *([number] if several else [])])] = tensor
    return found
