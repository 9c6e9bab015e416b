"""Fit corrections of a pruned model, layer by layer.

The dense model and the pruned one run side by side; each pruned layer gets the output of the
corrected layers below it. The error of a layer is the difference between the dense layer's output
and its own, so that a correction also offsets errors of the layers below. If a model does more with
its experts' output than add it, the error is that of the experts' output.

Legend: T tokens, E experts, H hidden size, I full intermediate size, F atoms kept of one expert, P
of all experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from vllm_atomic_moe.calibration.accumulator import Batch
from vllm_atomic_moe.calibration.collect import (
    CalibrationOptions,
    describe_calibration,
    find_original,
    read_text,
)
from vllm_atomic_moe.calibration.corrections import Columns, Correction, Parameters, ScaleAndBias
from vllm_atomic_moe.calibration.experts import (
    ExpertRows,
    ExpertsModule,
    Routed,
    observed_experts_forward,
)
from vllm_atomic_moe.calibration.fitting import fit
from vllm_atomic_moe.calibration.free_memory import free_bytes
from vllm_atomic_moe.calibration.kept import InMemory
from vllm_atomic_moe.calibration.layer_calls import HIDDEN
from vllm_atomic_moe.calibration.layer_reader import LayerReader, OneLayer
from vllm_atomic_moe.calibration.layer_walk import LayerWalk, Step
from vllm_atomic_moe.calibration.model import (
    check_vocabulary,
    loading_dtype,
    resolve_device,
    stored_dtype,
)
from vllm_atomic_moe.calibration.passes import batches
from vllm_atomic_moe.calibration.streaming import one_device
from vllm_atomic_moe.calibration.text import parse_files
from vllm_atomic_moe.files.compensation import Compensation
from vllm_atomic_moe.files.profiles import PruningProfile

Kind = Literal["columns", "scale and bias"]
HELD_OUT = 8  # every eighth batch
# Relative rounding error allowed when a layer adds a multiple of its experts' output.
ADDED = 0.05


@dataclass(slots=True)
class Watcher:
    """The `LayerObserver` of the walk: records the experts' inputs and outputs, and corrects them.

    Attributes:
        batch: the current batch.
        correct: returns the output to use in place of an expert's own.
        nowhere: whether to route all tokens to no expert.
        routed: the last inputs of the experts.
        output_TH: their weighted output; float32.
        rows: the rows of each expert.
    """

    batch: Batch = field(default_factory=Batch)
    correct: Callable[[int, ExpertRows], torch.Tensor] = lambda expert, rows: rows.y
    nowhere: bool = False
    routed: Routed | None = None
    output_TH: torch.Tensor | None = None
    rows: dict[int, ExpertRows] = field(default_factory=dict)

    def see_routing(self, module: ExpertsModule, routed: Routed) -> torch.Tensor:
        """Route padding to no expert."""
        ids_TK = self.batch.unpadded(routed.topk_ids_TK, module.num_experts)
        if self.nowhere:
            ids_TK = torch.full_like(ids_TK, module.num_experts)
        self.routed = routed._replace(topk_ids_TK=ids_TK)
        self.output_TH = torch.zeros_like(routed.hidden_TH, dtype=torch.float32)
        self.rows = {}
        return ids_TK

    def see_expert(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """Add up the experts' outputs."""
        y = self.correct(expert, rows)
        self.rows[expert] = rows
        assert self.output_TH is not None
        self.output_TH.index_add_(0, rows.tokens, y.float() * rows.p[:, None].float())
        return y


@dataclass(frozen=True, slots=True)
class LayerFit:
    """The fit of one layer.

    Attributes:
        before, after: squared error of held-out tokens, as a fraction of the squared output of the
            dense model's experts.
        down_t_PH: of a fit of columns: the columns of down_proj for the kept atoms, experts
            ascending.
        compensation: of a fit of scales and biases: these.
    """

    before: float
    after: float
    down_t_PH: torch.Tensor | None = None
    compensation: Compensation | None = None


@dataclass(frozen=True, slots=True)
class ModelFit:
    """The fit of a model.

    Attributes:
        layers: by layer index.
        calibration: the settings needed to repeat it.
        warnings: one line each.
    """

    layers: Mapping[int, LayerFit]
    calibration: Mapping[str, Any]
    warnings: list[str]

    def columns(self) -> dict[int, torch.Tensor]:
        """The columns by layer index; empty for a fit of scales and biases."""
        named = {layer: it.down_t_PH for layer, it in self.layers.items()}
        return {layer: it for layer, it in named.items() if it is not None}

    def compensation(self) -> dict[int, Compensation]:
        """Scales and biases by layer index; empty for a fit of columns."""
        named = {layer: it.compensation for layer, it in self.layers.items()}
        return {layer: it for layer, it in named.items() if it is not None}

    def report(self) -> dict[str, Any]:
        """Held-out error of every layer before and after, and the calibration; JSON."""
        errors = {str(layer): [it.before, it.after] for layer, it in self.layers.items()}
        return {"held_out_error": errors, "calibration": dict(self.calibration)}


def fit_model(
    model: str,
    profile: PruningProfile,
    kind: Kind,
    data: Sequence[str],
    options: CalibrationOptions,
    on_note: Callable[[str], None] = lambda line: None,
) -> ModelFit:
    """Fit corrections of a pruned model, layer by layer.

    Memory holds one layer, a few copies of the text's hidden states, and the parameters.

    Args:
        model: a local directory or a Hugging Face id.
        profile: the profile; without compensation.
        kind: of corrections.
        data: `PATH[:DOMAIN]` arguments, at least one.
        options: as for a calibration.
        on_note: called with one line per layer.

    Raises:
        ValueError: the text, the model, the profile or an option is refused (one line).
        OSError: the model's files cannot be read.
    """
    files = parse_files(data)
    device_map = resolve_device(options.device)
    directory, checkpoint = find_original(model)
    warnings = profile.check(checkpoint)
    if profile.compensation:
        raise ValueError(f"profile {profile.name!r} is compensated already; use one that is not")
    if profile.masks_routing:
        raise ValueError(
            f"profile {profile.name!r} excludes experts from routing, which is not fitted; use a "
            "profile that prunes atoms"
        )
    text = read_text(directory, files, options)
    trusted = options.trust_remote_code
    dtype = loading_dtype(options.dtype, directory, device_map, trusted)
    reader = LayerReader(directory, checkpoint, dtype, one_device(device_map), trusted)
    check_vocabulary(text, reader.outline)
    windows = list(batches(text, options.batch_size))
    if len(windows) < 2:
        raise ValueError(
            f"the text is {text.num_windows} windows of {options.seq_len} tokens in {len(windows)} "
            "batch; at least 2 are needed, since some are held out: use more text, or a smaller "
            "--seq-len or --batch-size"
        )
    columns = stored_dtype(directory, trusted)
    if not all(scheme.plain for scheme in checkpoint.schemes.values()) and columns.itemsize != 2:
        columns = torch.bfloat16
    kept = InMemory(free_bytes(torch.device("cpu")))
    run = Refit(reader, kept, windows, profile, kind, columns, on_note)
    calibration = describe_calibration(text, options, dtype)
    return ModelFit(run.run(), calibration, [*text.warnings, *warnings])


@dataclass(slots=True)
class Refit(LayerWalk):
    """A fit of all layers of a pruned model.

    Attributes:
        profile: the profile; it does not mask routing.
        kind: of the corrections.
        dtype: of the columns.
        on_note: called with one line per layer.
    """

    profile: PruningProfile
    kind: Kind
    dtype: torch.dtype
    on_note: Callable[[str], None]

    def run(self) -> dict[int, LayerFit]:
        """Fit all layers.

        Raises:
            ValueError: numbers are not finite, memory does not suffice, or the layers cannot be
                called alone.
        """
        self.begin("dense-0")
        # Inputs and outputs of two models, and the tensors that are compared.
        self.check_room("dense-0", 8)
        self.kept.begin("pruned-0")
        for number in range(len(self.batches)):
            self.kept.put("pruned-0", number, self.kept.get("dense-0", number))
        found: dict[int, LayerFit] = {}
        last = max(self.reader.checkpoint.layers)
        for layer in range(last + 1):
            with self.reader.layer(layer) as read:
                if read[2] is None:
                    for model in ("dense", "pruned"):
                        self._run(model, layer, read, Watcher())
                else:
                    found[layer] = self._fit_layer(layer, read)
            for model in ("dense", "pruned"):
                self.kept.drop(f"{model}-{layer}")
            if layer in found:
                before, after = found[layer].before, found[layer].after
                self.on_note(
                    f"layer {layer} of {last}: held-out error {before:.2%}, fitted {after:.2%}"
                )
        return found

    def _run(
        self,
        model: str,
        layer: int,
        read: OneLayer,
        watcher: Watcher,
        also: Callable[[Step, torch.Tensor], None] = lambda step, output_TH: None,
    ) -> None:
        """Run a layer of one of the two models, and keep its output for the next."""
        stage = f"{model}-{layer + 1}"
        self.kept.begin(stage)

        def do(step: Step) -> None:
            made = step.run()
            self.check_finite(layer, step, made)
            also(step, made[HIDDEN].flatten(0, 1))
            self.keep_inputs(stage, layer + 1, step.number, made)

        self.each_batch(f"{model}-{layer}", layer, read, watcher, do)

    def _fit_layer(self, layer: int, read: OneLayer) -> LayerFit:
        experts, keep_EI = read[2], self.profile.keep[layer]
        held_out = _held_out(len(self.batches))
        wanted: list[torch.Tensor] = []  # by batch, the experts' output
        watcher, factor = Watcher(), 0.0

        def see_dense(step: Step, output_TH: torch.Tensor) -> None:
            nonlocal factor
            assert watcher.output_TH is not None
            wanted.append(watcher.output_TH.cpu())
            if step.number == 0:
                factor = _factor(step, watcher, output_TH)

        self._run("dense", layer, read, watcher, see_dense)
        scale = sum(float(it.double().square().sum()) for it in _of(wanted, held_out))

        prune(experts, keep_EI)
        routed: list[Routed] = []
        errors: list[torch.Tensor] = []

        def see_pruned(step: Step) -> None:
            made = step.run()
            self.check_finite(layer, step, made)
            assert watcher.routed is not None
            assert watcher.output_TH is not None
            routed.append(Routed(*(it.cpu() for it in watcher.routed)))
            if factor:
                dense = self.kept.get(f"dense-{layer + 1}", step.number)[HIDDEN]
                error_TH = (dense.flatten(0, 1).float() - made[HIDDEN].cpu().flatten(0, 1)) / factor
            else:
                error_TH = wanted[step.number] - watcher.output_TH.cpu()
            if step.batch.padding_T is not None:
                error_TH.masked_fill_(step.batch.padding_T[:, None], 0)
            errors.append(error_TH)

        self.each_batch(f"pruned-{layer}", layer, read, watcher, see_pruned)
        correction = Columns(keep_EI) if self.kind == "columns" else ScaleAndBias()
        rows = partial(_rows, experts, routed, self.reader.device)
        fitted = fit(correction, rows, errors, held_out)
        parameters = fitted.parameters
        made = LayerFit(fitted.before / scale, fitted.after / scale)
        if self.kind == "columns":
            columns_PH, parameters = self._columns(experts, keep_EI, parameters)
            made = replace(made, down_t_PH=columns_PH)
        else:
            made = replace(made, compensation=self._compensation(parameters))
        self._run(
            "pruned", layer, read, Watcher(correct=partial(_corrected, correction, parameters))
        )
        return made

    def _columns(
        self, experts: ExpertsModule, keep_EI: torch.Tensor, parameters: Parameters
    ) -> tuple[torch.Tensor, Parameters]:
        """The columns in the checkpoint's dtype, and their difference from the old ones."""
        found, rounded = [], {}
        for expert, keep_I in enumerate(keep_EI):
            down = experts.down_proj[expert]
            rows_IH = down if experts.is_transposed else down.t()
            old_FH = rows_IH[keep_I.to(down.device)].float()
            new_FH = old_FH.to(self.dtype)
            if expert in parameters:
                new_FH = (old_FH + parameters[expert]).to(self.dtype)
                rounded[expert] = new_FH.float() - old_FH
            found.append(new_FH.cpu())
        return torch.cat(found), rounded

    def _compensation(self, parameters: Parameters) -> Compensation:
        info = self.reader.checkpoint
        scale_E = torch.ones(info.num_experts)
        bias_EH = torch.zeros(info.num_experts, info.hidden_size)
        for expert, of_expert in parameters.items():
            scale_E[expert] += of_expert[0].cpu()
            bias_EH[expert] = of_expert[1:].cpu()
        return Compensation(scale_E, bias_EH)


@torch.no_grad()
def prune(experts: ExpertsModule, keep_EI: torch.Tensor) -> None:
    """Set the down-projection's columns of pruned atoms to zero."""
    gone_EI = ~keep_EI.to(experts.down_proj.device)
    gone = gone_EI[:, :, None] if experts.is_transposed else gone_EI[:, None, :]
    experts.down_proj.masked_fill_(gone, 0)


def _factor(step: Step, watcher: Watcher, output_TH: torch.Tensor) -> float:
    """The factor by which the layer multiplies its experts' output before adding it; 0 if it does
    more than that.
    """
    experts_TH = watcher.output_TH
    assert experts_TH is not None
    watcher.nowhere = True
    added_TH = output_TH.float() - step.run()[HIDDEN].flatten(0, 1).float()
    watcher.nowhere = False
    if step.batch.padding_T is not None:
        added_TH.masked_fill_(step.batch.padding_T.to(added_TH.device)[:, None], 0)
    factor = float((added_TH * experts_TH).sum() / experts_TH.square().sum())
    left = torch.linalg.vector_norm(added_TH - factor * experts_TH)
    return factor if left <= ADDED * torch.linalg.vector_norm(added_TH) else 0.0


def _rows(
    experts: ExpertsModule, routed: Sequence[Routed], device: torch.device
) -> Iterator[dict[int, ExpertRows]]:
    """For each batch, the rows of every expert."""
    watcher = experts.layer_observer = Watcher()
    try:
        for given in routed:
            with torch.no_grad():
                observed_experts_forward(experts, *(it.to(device) for it in given))
            yield watcher.rows
    finally:
        del experts.layer_observer


def _corrected(
    correction: Correction, parameters: Parameters, expert: int, rows: ExpertRows
) -> torch.Tensor:
    if expert not in parameters:
        return rows.y
    return (rows.y.float() + correction.apply(expert, parameters[expert], rows)).to(rows.y.dtype)


def _held_out(batches: int) -> list[bool]:
    """Which batches are held out: every eighth, at least one."""
    return [(batches - 1 - number) % HELD_OUT == 0 for number in range(batches)]


def _of(values: Sequence[torch.Tensor], chosen: Sequence[bool]) -> Iterator[torch.Tensor]:
    return (value for value, wanted in zip(values, chosen, strict=True) if wanted)
