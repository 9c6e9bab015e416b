"""Calibration one decoder layer at a time, for models larger than memory.

A forward sweep keeps every layer's input, the loss gives the gradient of the last one's output, and
a backward sweep reads each layer again, runs it with gradients, and adds up the sums that `collect`
adds up. Every layer is read twice, and only transformers' own modules compute.

Stages (see `kept`): `inputs-N` is what layer N is given, `gradients-N` the gradients with respect
to that, `sums-N` the layer's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from vllm_atomic_moe.calibration.accumulator import Batch, LayerAccumulator, Unwatched
from vllm_atomic_moe.calibration.experts import observe
from vllm_atomic_moe.calibration.free_memory import give_back_at_once
from vllm_atomic_moe.calibration.kept import Kept
from vllm_atomic_moe.calibration.layer_calls import (
    HIDDEN,
    CallRecorder,
    LayerCall,
    Tensors,
    ending_in,
    is_entry,
    replaced,
)
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.passes import (
    batches,
    check_loss,
    failures_explained,
    not_finite,
    run_forward_backward,
)
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.statistics import LayerSums

# A backward step in forward steps: it runs the layer again, then backward, and adds up.
BACKWARD = 3


@dataclass(slots=True)
class StreamedRun:
    """One calibration, layer by layer.

    Attributes:
        reader: the checkpoint.
        kept: where layers' inputs are kept.
        batches: (domain index, int32 [windows, seq_len]).
        shape: (D, E, I) of the sums.
        gradients: whether to run the backward sweep.
        on_progress: called with (done, in all), in forward steps of one window in one layer.
        calls: by batch and layer.
    """

    reader: LayerReader
    kept: Kept
    batches: list[tuple[int, torch.Tensor]]
    shape: tuple[int, int, int]
    gradients: bool
    on_progress: Callable[[int, int], None]
    calls: list[list[LayerCall]] = field(default_factory=list)
    _done: int = 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts, ascending."""
        return self.reader.checkpoint.layers

    @property
    def last(self) -> int:
        """Layers that the forward sweep runs: without gradients none above the last experts."""
        return self.reader.layers if self.gradients else self.moe_layers[-1] + 1

    def run(self) -> dict[int, LayerSums]:
        """All of it.

        Raises:
            ValueError: as `collect_streamed`.
        """
        self._begin()
        if not self.gradients:
            self._forward(self._resume_forward())
        else:
            above = self._resume_backward()
            if above is None:
                self._forward(self._resume_forward())
                self._loss()
                above = self.reader.layers
            self._backward(above)
        return {layer: LayerSums(**self.kept.get(f"sums-{layer}", 0)) for layer in self.moe_layers}

    def _begin(self) -> None:
        """Note how layers are called, and keep what the first one is given."""
        recorder = CallRecorder()
        self.kept.begin("inputs-0")
        with self.reader.around() as model:
            blocks = self.reader.blocks(model)
            names = {id(module): name for name, module in model.named_modules()}
            for number, (_, ids) in enumerate(self.batches):
                with failures_explained(model, names, ids):
                    calls, hidden = recorder.record(model, blocks, ids)
                self.calls.append(calls)
                self.kept.put("inputs-0", number, {HIDDEN: hidden.detach().cpu()})
        self.kept.finish("inputs-0")
        self._check_room()

    def _check_room(self) -> None:
        [first] = self.kept.get("inputs-0", 0).values()
        one = first.nbytes // first.shape[0] * self._windows
        # Without gradients two layers' inputs; with them all of them, and two layers' gradients.
        needed = one * (self.reader.layers + 3 if self.gradients else 2)
        if needed > (room := self.kept.room()):
            raise ValueError(
                f"the layers' inputs take {needed / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are "
                "free; use --scratch with a directory that has the room, or smaller --samples"
            )

    def _resume_forward(self) -> int:
        """The first layer that the forward sweep has to run."""
        layers = range(self.last + 1)
        if not self.gradients:
            sound = [
                layer
                for layer in layers
                if self.kept.finished(f"inputs-{layer}") and self._summed(layer, upward=False)
            ]
            return max(sound)
        return next(
            (layer for layer in range(self.last) if not self.kept.finished(f"inputs-{layer + 1}")),
            self.last,
        )

    def _resume_backward(self) -> int | None:
        """The lowest layer that the backward sweep is done with, if it has begun."""
        lowest = self.moe_layers[0]
        for layer in range(lowest, self.reader.layers + 1):
            if self.kept.finished(f"gradients-{layer}") and self._summed(layer, upward=True):
                below = range(lowest, layer)
                return layer if all(self.kept.finished(f"inputs-{it}") for it in below) else None
        return None

    def _summed(self, layer: int, upward: bool) -> bool:
        """Whether the sums of all layers from `layer` on, or of all below it, are there."""
        wanted = (it for it in self.moe_layers if (it >= layer) == upward)
        return all(self.kept.finished(f"sums-{it}") for it in wanted)

    def _forward(self, first: int) -> None:
        self._advance(self._windows * first, from_start=True)
        for layer in range(first, self.last):
            summed = layer in self.moe_layers and not self.gradients
            accumulator = LayerAccumulator(self.shape, False, Batch()) if summed else None
            self.kept.begin(f"inputs-{layer + 1}")
            self._each_batch(layer, accumulator, partial(self._step_forward, layer + 1))
            if accumulator is not None:
                self._keep_sums(layer, accumulator)
            self.kept.finish(f"inputs-{layer + 1}")
            if not self.gradients:
                self.kept.drop(f"inputs-{layer}")

    def _step_forward(self, above: int, step: Step) -> None:
        made = step.run()
        finite_T = made[HIDDEN].isfinite().flatten(0, 1).all(dim=1)
        if step.batch.padding_T is not None:
            finite_T = finite_T | step.batch.padding_T.to(finite_T.device)
        if not bool(finite_T.all()):
            raise not_finite(above - 1, "activations", self.reader.dtype)
        if above < self.last or self.gradients:
            takes = frozenset({HIDDEN})
            if above < self.reader.layers:
                entries = {name for name in made if is_entry(name)}
                takes = self.calls[step.number][above].takes | entries
            kept = {name: tensor.cpu() for name, tensor in made.items() if name in takes}
            self.kept.put(f"inputs-{above}", step.number, kept)
        self._advance(step.windows)

    def _loss(self) -> None:
        layers = self.reader.layers
        self.kept.begin(f"gradients-{layers}")
        with self.reader.around() as model:
            blocks = self.reader.blocks(model)
            names = {id(module): name for name, module in model.named_modules()}
            for number, (_, ids) in enumerate(self.batches):
                inputs = self.kept.get(f"inputs-{layers}", number)
                hidden = inputs[HIDDEN].to(self.reader.device).detach().requires_grad_()
                extras = self.calls[number][-1].extras
                with (
                    replaced(blocks, ending_in(hidden, extras, layers)),
                    failures_explained(model, names, ids),
                ):
                    loss = run_forward_backward(model, ids)
                check_loss(loss, self.reader.dtype)
                assert hidden.grad is not None
                self.kept.put(f"gradients-{layers}", number, {HIDDEN: hidden.grad.cpu()})
                self._advance(ids.shape[0])
        self.kept.finish(f"gradients-{layers}")
        self.kept.drop(f"inputs-{layers}")

    def _backward(self, above: int) -> None:
        done = self.reader.layers + 1 + BACKWARD * (self.reader.layers - above)
        self._advance(self._windows * done, from_start=True)
        for layer in reversed(range(self.moe_layers[0], above)):
            summed = layer in self.moe_layers
            accumulator = LayerAccumulator(self.shape, True, Batch()) if summed else None
            self.kept.begin(f"gradients-{layer}")
            self._each_batch(layer, accumulator, partial(self._step_backward, layer, accumulator))
            if accumulator is not None:
                self._keep_sums(layer, accumulator)
            self.kept.finish(f"gradients-{layer}")
            self.kept.drop(f"gradients-{layer + 1}")
            self.kept.drop(f"inputs-{layer}")

    def _step_backward(self, layer: int, accumulator: LayerAccumulator | None, step: Step) -> None:
        gradients = step.run_backward(self.kept.get(f"gradients-{layer + 1}", step.number))
        if accumulator and (what := accumulator.not_finite(step.batch.domain)):
            raise not_finite(layer, what, self.reader.dtype)
        self.kept.put(f"gradients-{layer}", step.number, gradients)
        self._advance(step.windows * BACKWARD)

    def _keep_sums(self, layer: int, accumulator: LayerAccumulator) -> None:
        self.kept.begin(f"sums-{layer}")
        self.kept.put(f"sums-{layer}", 0, accumulator.result().tensors())
        self.kept.finish(f"sums-{layer}")

    def _each_batch(
        self, layer: int, accumulator: LayerAccumulator | None, do: Callable[[Step], None]
    ) -> None:
        """Read a layer, and do something with it for every batch."""
        with self.reader.layer(layer) as (model, block, experts):
            names = {id(module): name for name, module in model.named_modules()}
            observer = accumulator or Unwatched(Batch())
            routed = {} if experts is None else {layer: experts}
            with observe(model, routed, {layer: observer}):
                for number, (domain, ids) in enumerate(self.batches):
                    observer.batch = Batch.of(domain, ids)
                    given = {
                        name: tensor.to(self.reader.device)
                        for name, tensor in self.kept.get(f"inputs-{layer}", number).items()
                    }
                    explained = partial(failures_explained, model, names, ids)
                    call = self.calls[number][layer]
                    do(Step(number, observer.batch, ids.shape[0], call, block, given, explained))

    @property
    def _windows(self) -> int:
        return sum(ids.shape[0] for _, ids in self.batches)

    def _advance(self, steps: int, from_start: bool = False) -> None:
        self._done = steps + (0 if from_start else self._done)
        backward = self.reader.layers - self.moe_layers[0]
        layers = self.last + (1 + BACKWARD * backward if self.gradients else 0)
        self.on_progress(self._done, self._windows * layers)


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's run over one batch.

    Attributes:
        number: of the batch.
        batch: the batch.
        windows: in the batch.
        call: how the model calls the layer.
        block: the layer.
        given: what the layer is given, on its device.
        explained: context that explains what the layer's own code raises.
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
        """What the layer makes."""
        # Of copies: some layers write into what they are given.
        given = {name: tensor.clone() for name, tensor in self.given.items()}
        with self.explained():
            return self.call.run(self.block, given)

    def run_backward(self, gradients: Mapping[str, torch.Tensor]) -> Tensors:
        """Run the layer forward and backward.

        Args:
            gradients: with respect to what the layer makes, by name.

        Returns:
            The gradients with respect to what it is given, on the CPU.
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


def collect_streamed(
    reader: LayerReader,
    kept: Kept,
    text: CalibrationText,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    gradients: bool = True,
) -> dict[int, LayerSums]:
    """Sums over the windows of `text`, as `collect` sums them, one layer in memory at a time.

    Args:
        reader: the checkpoint.
        kept: where layers' inputs are kept; finished stages of the same run are not made again.
        text: the windows.
        batch_size: windows per forward.
        on_progress: called with (done, in all), in forward steps of one window in one layer.
        gradients: whether to run the backward sweep.

    Raises:
        ValueError: as `collect`; or a layer cannot be called alone, a weight cannot be read, or
            what is kept does not fit.
    """
    give_back_at_once()
    shape = (len(text.windows), reader.checkpoint.num_experts, reader.checkpoint.intermediate_size)
    run = StreamedRun(reader, kept, list(batches(text, batch_size)), shape, gradients, on_progress)
    return run.run()
