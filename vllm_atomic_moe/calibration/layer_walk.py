"""Run a model's decoder layers one after another over the same text, with their experts observed.

The model's calls of its layers are recorded once. The inputs of a layer are kept batch by batch
(see `kept`), so that only one layer is in memory, and a layer can run again. Only transformers' own
modules compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import nn

from vllm_atomic_moe.calibration.accumulator import Batch
from vllm_atomic_moe.calibration.experts import LayerObserver, observe
from vllm_atomic_moe.calibration.kept import Kept
from vllm_atomic_moe.calibration.layer_calls import (
    HIDDEN,
    CallRecorder,
    LayerCall,
    Tensors,
    is_entry,
)
from vllm_atomic_moe.calibration.layer_reader import LayerReader, OneLayer
from vllm_atomic_moe.calibration.passes import failures_explained, not_finite


class BatchObserver(LayerObserver, Protocol):
    """An observer of one layer's experts that knows the current batch."""

    batch: Batch


@dataclass(slots=True)
class LayerWalk:
    """All layers of one checkpoint, over one text.

    Attributes:
        reader: the checkpoint.
        kept: store of the layers' inputs.
        batches: (domain index, int32 [windows, seq_len]).
        calls: by batch and layer.
    """

    reader: LayerReader
    kept: Kept
    batches: list[tuple[int, torch.Tensor]]
    calls: list[list[LayerCall]] = field(default_factory=list, init=False)

    def begin(self, stage: str) -> None:
        """Record how layers are called, and keep the inputs of the first one as `stage`.

        Raises:
            ValueError: the layers cannot be called alone.
        """
        recorder = CallRecorder()
        self.kept.begin(stage)
        with self.reader.around() as model:
            blocks = self.reader.blocks(model)
            names = {id(module): name for name, module in model.named_modules()}
            for number, (_, ids) in enumerate(self.batches):
                with failures_explained(model, names, ids):
                    calls, hidden = recorder.record(model, blocks, ids)
                self.calls.append(calls)
                self.kept.put(stage, number, {HIDDEN: hidden.detach().cpu()})
        self.kept.finish(stage)

    def check_room(self, stage: str, copies: int) -> None:
        """Check that the inputs of all layers fit.

        Args:
            stage: the inputs of the first layer.
            copies: how many copies of them are kept at once.

        Raises:
            ValueError: they do not fit; names both sizes.
        """
        [first] = self.kept.get(stage, 0).values()
        needed = first.nbytes // first.shape[0] * self.windows * copies
        if needed > (room := self.kept.room()):
            raise ValueError(
                f"the layers' inputs take {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are "
                "free; use --scratch with a directory that has the room, or smaller --samples"
            )

    def each_batch(
        self,
        stage: str,
        index: int,
        layer: OneLayer,
        observer: BatchObserver,
        do: Callable[[Step], None],
    ) -> None:
        """Call `do` for every batch, with the layer's experts observed.

        Args:
            stage: the layer's inputs.
            index: of the layer.
            layer: as the reader returns it.
            observer: of its experts; not called if the layer has none.
            do: called with the step of each batch.
        """
        model, block, experts = layer
        names = {id(module): name for name, module in model.named_modules()}
        routed = {} if experts is None else {index: experts}
        with observe(model, routed, {index: observer}):
            for number, (domain, ids) in enumerate(self.batches):
                observer.batch = Batch.of(domain, ids)
                given = {
                    name: tensor.to(self.reader.device)
                    for name, tensor in self.kept.get(stage, number).items()
                }
                explained = partial(failures_explained, model, names, ids)
                call = self.calls[number][index]
                do(Step(number, observer.batch, ids.shape[0], call, block, given, explained))

    def check_finite(self, layer: int, step: Step, made: Mapping[str, torch.Tensor]) -> None:
        """Refuse activations outside the range of the dtype, except those of padding.

        Raises:
            ValueError: names the layer.
        """
        finite_T = made[HIDDEN].isfinite().flatten(0, 1).all(dim=1)
        if step.batch.padding_T is not None:
            finite_T = finite_T | step.batch.padding_T.to(finite_T.device)
        if not bool(finite_T.all()):
            raise not_finite(layer, "activations", self.reader.dtype)

    def keep_inputs(
        self, stage: str, layer: int, number: int, made: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep the output of the layer below as the inputs of `layer` for one batch."""
        takes = frozenset({HIDDEN})
        if layer < self.reader.layers:
            takes = self.calls[number][layer].takes | {name for name in made if is_entry(name)}
        inputs = {name: tensor.cpu() for name, tensor in made.items() if name in takes}
        self.kept.put(stage, number, inputs)

    @property
    def windows(self) -> int:
        """Number of windows in all batches."""
        return sum(ids.shape[0] for _, ids in self.batches)


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's run over one batch.

    Attributes:
        number: of the batch.
        batch: the batch.
        windows: in the batch.
        call: the model's call of the layer.
        block: the layer.
        given: inputs of the layer, on its device.
        explained: context that turns errors of the layer's code into one line.
    """

    number: int
    batch: Batch
    windows: int
    call: LayerCall
    block: nn.Module
    given: Mapping[str, torch.Tensor]
    explained: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def run(self) -> Tensors:
        """The outputs of the layer."""
        # Copies, because some layers write into their inputs.
        given = {name: tensor.clone() for name, tensor in self.given.items()}
        with self.explained():
            return self.call.run(self.block, given)

    def run_backward(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        """Run the layer forward and backward.

        Args:
            gradients: with respect to the outputs, by name.

        Returns:
            The gradients with respect to the inputs, on the CPU.
        """
        leaves = {
            name: tensor.detach().requires_grad_(tensor.is_floating_point())
            for name, tensor in self.given.items()
        }
        given = {name: leaf.clone() for name, leaf in leaves.items()}
        with self.explained():
            made = self.call.run(self.block, given)
            names = [name for name in gradients if made[name].requires_grad]
            torch.autograd.backward(
                [made[name] for name in names],
                [gradients[name].to(made[name].device) for name in names],
            )
        return {name: it.grad.cpu() for name, it in leaves.items() if it.grad is not None}
