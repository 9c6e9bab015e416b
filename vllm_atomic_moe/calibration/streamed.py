"""Calibration one decoder layer at a time, for models larger than memory.

A forward sweep keeps every layer's input. The loss gives the gradient of the last layer's output. A
backward sweep reads each layer again, runs it with gradients, and adds up the same sums as
`collect`. Every layer is read twice, and only transformers' own modules compute.

Stages (see `kept`): `inputs-N` holds the inputs of layer N, `gradients-N` the gradients with
respect to them, `sums-N` the layer's sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vllm_atomic_moe.calibration.accumulator import Batch, LayerAccumulator, Unwatched
from vllm_atomic_moe.calibration.free_memory import give_back_at_once
from vllm_atomic_moe.calibration.kept import Kept
from vllm_atomic_moe.calibration.layer_calls import HIDDEN, ending_in, replaced
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.layer_walk import LayerWalk, Step
from vllm_atomic_moe.calibration.passes import (
    batches,
    check_loss,
    failures_explained,
    not_finite,
    run_forward_backward,
)
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.statistics import LayerSums

# Cost of a backward step in forward steps: it runs the layer again, then backward, and adds up.
BACKWARD = 3


@dataclass(slots=True)
class StreamedRun(LayerWalk):
    """One calibration, layer by layer.

    Attributes:
        shape: (D, E, I) of the sums.
        gradients: whether to run the backward sweep.
        on_progress: called with (done, in all), in forward steps of one window in one layer.
    """

    shape: tuple[int, int, int]
    gradients: bool
    on_progress: Callable[[int, int], None]
    _done: int = 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts, ascending."""
        return self.reader.checkpoint.layers

    @property
    def last(self) -> int:
        """Number of layers in the forward sweep: without gradients it ends at the last experts."""
        return self.reader.layers if self.gradients else self.moe_layers[-1] + 1

    def run(self) -> dict[int, LayerSums]:
        """Run both sweeps.

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
        """Record how layers are called, and keep the first layer's inputs."""
        self.begin("inputs-0")
        # Without gradients, two layers' inputs; with them, all inputs and two layers' gradients.
        self.check_room("inputs-0", self.reader.layers + 3 if self.gradients else 2)

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
        """The lowest layer that the backward sweep finished, if it has begun."""
        lowest = self.moe_layers[0]
        for layer in range(lowest, self.reader.layers + 1):
            if self.kept.finished(f"gradients-{layer}") and self._summed(layer, upward=True):
                below = range(lowest, layer)
                return layer if all(self.kept.finished(f"inputs-{it}") for it in below) else None
        return None

    def _summed(self, layer: int, upward: bool) -> bool:
        """Whether the sums of all layers from `layer` up, or of all below it, are finished."""
        wanted = (it for it in self.moe_layers if (it >= layer) == upward)
        return all(self.kept.finished(f"sums-{it}") for it in wanted)

    def _forward(self, first: int) -> None:
        self._advance(self.windows * first, from_start=True)
        for layer in range(first, self.last):
            summed = layer in self.moe_layers and not self.gradients
            accumulator = LayerAccumulator(self.shape, False, Batch()) if summed else None
            self.kept.begin(f"inputs-{layer + 1}")
            self._read_and_run(layer, accumulator, partial(self._step_forward, layer + 1))
            if accumulator is not None:
                self._keep_sums(layer, accumulator)
            self.kept.finish(f"inputs-{layer + 1}")
            if not self.gradients:
                self.kept.drop(f"inputs-{layer}")

    def _step_forward(self, above: int, step: Step) -> None:
        made = step.run()
        self.check_finite(above - 1, step, made)
        if above < self.last or self.gradients:
            self.keep_inputs(f"inputs-{above}", above, step.number, made)
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
        self._advance(self.windows * done, from_start=True)
        for layer in reversed(range(self.moe_layers[0], above)):
            summed = layer in self.moe_layers
            accumulator = LayerAccumulator(self.shape, True, Batch()) if summed else None
            self.kept.begin(f"gradients-{layer}")
            self._read_and_run(layer, accumulator, partial(self._step_backward, layer, accumulator))
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

    def _read_and_run(
        self, layer: int, accumulator: LayerAccumulator | None, do: Callable[[Step], None]
    ) -> None:
        """Read a layer, and call a function with it for every batch."""
        observer = accumulator or Unwatched(Batch())
        with self.reader.layer(layer) as read:
            self.each_batch(f"inputs-{layer}", layer, read, observer, do)

    def _advance(self, steps: int, from_start: bool = False) -> None:
        self._done = steps + (0 if from_start else self._done)
        backward = self.reader.layers - self.moe_layers[0]
        layers = self.last + (1 + BACKWARD * backward if self.gradients else 0)
        self.on_progress(self._done, self.windows * layers)


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
        kept: store of the layers' inputs; finished stages of the same run are not made again.
        text: the windows.
        batch_size: windows per forward.
        on_progress: called with (done, in all), in forward steps of one window in one layer.
        gradients: whether to run the backward sweep.

    Raises:
        ValueError: as `collect`; or a layer cannot be called alone, a weight cannot be read, or
            the inputs do not fit.
    """
    give_back_at_once()
    shape = (len(text.windows), reader.checkpoint.num_experts, reader.checkpoint.intermediate_size)
    run = StreamedRun(reader, kept, list(batches(text, batch_size)), shape, gradients, on_progress)
    return run.run()
