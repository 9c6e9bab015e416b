"""Reads a checkpoint one decoder layer at a time, through transformers' own loading.

Every read builds the whole model with `from_pretrained`, which handles names, fused experts,
dtypes, buffers and tied heads. It gets all tensors but the wanted ones without data: they stay on
the meta device and take no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_atomic_moe.calibration.dequantized import stored_weights
from vllm_atomic_moe.calibration.experts import (
    LAYER,
    ExpertsModule,
    find_experts,
)
from vllm_atomic_moe.calibration.model import (
    check_missing,
    empty_model,
    failures_explained,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.config import quantization_settings, read_config
from vllm_atomic_moe.files.shards import Shards


@dataclass(frozen=True, slots=True)
class Absent:
    """Placeholder for a tensor that is not read; becomes one on the meta device."""

    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Absent:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Called when transformers places the tensor; returns one without data."""
        return torch.empty(self.shape, dtype=dtype, device="meta")


OneLayer = tuple[PreTrainedModel, nn.Module, ExpertsModule | None]
"""A model with the weights of one decoder layer; that layer; its routed experts, if any."""


class LayerReader:
    """Reads a checkpoint's decoder layers one at a time, and the weights outside of them.

    Attributes:
        directory: of the checkpoint.
        checkpoint: its routed experts.
        dtype: of the returned weights; quantized ones are decoded.
        device: of the returned weights.
        layers: number of decoder layers.
        largest_layer_bytes: size of its largest decoder layer.
        outline: the model on the meta device.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: CheckpointInfo,
        dtype: torch.dtype,
        device: torch.device,
        trusted: bool = False,
    ) -> None:
        """Describe the checkpoint; no weights are read.

        Raises:
            ValueError: transformers refuses the model, or the checkpoint lacks weights.
        """
        self.directory, self.checkpoint, self.device = directory, checkpoint, device
        self.dtype = dtype
        self._settings, empty = empty_model(directory, trusted)
        self._kind, self._config = type(empty), empty.config
        self._of_model = {name: (*it.shape,) for name, it in empty.state_dict().items()}
        self._prefix = _prefix_of_layers(empty, checkpoint)
        self._stored_prefix = _before_index(f"{next(iter(checkpoint.blocks.values()))}.")
        self.layers = len(self.blocks(empty))
        with Shards(directory) as shards:
            stored = stored_weights(shards, self._settings, shards.where, _ignore)
            # Load everything without data: a mismatch with the model is refused before reading.
            self.outline = self._load({name: Absent(it.shape) for name, it in stored.items()})
        self.largest_layer_bytes = max(_nbytes(block) for block in self.blocks(self.outline))

    @contextmanager
    def around(self) -> Iterator[PreTrainedModel]:
        """The model with all weights except those of its decoder layers.

        Raises:
            ValueError: a weight cannot be read.
        """
        with self._read(None) as model:
            yield model

    @contextmanager
    def layer(self, index: int) -> Iterator[OneLayer]:
        """The model with only one decoder layer's weights.

        Raises:
            ValueError: a weight cannot be read.
        """
        with self._read(index) as model:
            experts = find_experts(model, self.checkpoint)
            yield model, self.blocks(model)[index], experts.get(index)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a model from this reader."""
        blocks = model.get_submodule(self._prefix.rstrip("."))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @contextmanager
    def _read(self, wanted: int | None) -> Iterator[PreTrainedModel]:
        failures: list[ValueError] = []
        with Shards(self.directory) as shards:
            names = [it for it in shards.where if _layer(it, self._stored_prefix) == wanted]
            weights: dict[str, Any] = {
                name: Absent(shape)
                for name, shape in self._of_model.items()
                if _layer(name, self._prefix) != wanted
            }
            weights |= stored_weights(shards, self._settings, names, failures.append)
            try:
                model = self._load(weights)
            except ValueError as error:
                raise (failures[0] if failures else error) from None
        model.requires_grad_(False)
        there = [it for it in chain(model.parameters(), model.buffers()) if not it.is_meta]
        for tensor in there:
            # Copy: a slice of a file keeps the whole file mapped.
            tensor.data = tensor.data.to(self.device, copy=True)
        try:
            yield model
        finally:
            # Free the weights before the next read, even if something still refers to the model.
            for tensor in there:
                tensor.data = tensor.data.new_empty(0)

    def _load(self, weights: Mapping[str, Any]) -> PreTrainedModel:
        with failures_explained(self.directory):
            model, loading = self._kind.from_pretrained(
                None,
                config=self._config,
                state_dict=dict(weights),
                dtype=self.dtype,
                device_map={"": "cpu"},
                output_loading_info=True,
            )
        check_missing(self.directory, model, loading["missing_keys"])
        return model.eval()


def weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a checkpoint in `dtype`, decoded if quantized; from the headers."""
    settings = quantization_settings(directory, read_config(directory)) or {}
    with Shards(directory) as shards:
        stored = stored_weights(shards, settings, shards.where, _ignore)
        return sum(math.prod(it.shape) for it in stored.values()) * dtype.itemsize


def _layer(name: str, prefix: str) -> int | None:
    """Index of the decoder layer that a tensor belongs to; None if it belongs to none."""
    if not name.startswith(prefix):
        return None
    return int(name.removeprefix(prefix).partition(".")[0])


def _prefix_of_layers(model: PreTrainedModel, checkpoint: CheckpointInfo) -> str:
    """The common prefix of all names in the decoder layers, dot included."""
    module = next(iter(find_experts(model, checkpoint).values()))
    return _before_index(next(name for name, it in model.named_modules() if it is module))


def _before_index(name: str) -> str:
    """The part of a decoder layer's name before the layer's index."""
    *_, last = LAYER.finditer(name)
    return f"{name[: last.start()]}layers."


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _ignore(error: ValueError) -> None:
    """No tensor is read, so none can fail."""
