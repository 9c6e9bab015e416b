"""One batch of windows through a model: forward, loss, backward, and errors in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel

from vllm_atomic_moe.calibration.model import ALL_OF_IT
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.plain_files import one_line

REMEDIES = {
    torch.float16: "use --dtype bfloat16 or --dtype float32",
    torch.bfloat16: "use --dtype float32",
}
IGNORED = -100  # the target that cross_entropy ignores


class CannotStreamError(ValueError):
    """The layers of a model cannot be called alone."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}, so the model cannot be calibrated layer by layer; use --no-stream, and a "
            "machine whose memory holds all of it"
        )


def batches(text: CalibrationText, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(domain index, int32 [windows, seq_len]); no batch mixes domains."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: wanted at least 1")
    for domain, windows in enumerate(text.windows.values()):
        for ids in windows.split(batch_size) if windows.numel() else ():
            yield domain, ids


def model_inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """The model's inputs: padding becomes token 0, to which no other token attends."""
    # The first parameter's device is `meta` if accelerate offloads it; its hooks move the input.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    inputs: dict[str, Any] = {"input_ids": ids.clamp_min(0).to(device, torch.int64)}
    if bool((ids < 0).any()):
        inputs["attention_mask"] = (ids >= 0).to(device, torch.int64)
    return {**inputs, "use_cache": False}


@torch.no_grad()
def run_forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward of the layers; the language-model head is not needed."""
    model.base_model(**model_inputs(model, ids))


def run_forward_backward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """One forward, one backward. Windows are independent, so the losses of a batch add up.

    Returns:
        The loss. If it is not finite, the backward pass is skipped.
    """
    logits = model(**model_inputs(model, ids)).logits[:, :-1].flatten(0, 1)
    # At least float32: a bf16 sum over thousands of tokens would be coarse.
    precise = logits if logits.dtype == torch.float64 else logits.float()
    targets = ids[:, 1:].flatten().to(logits.device, torch.int64)
    # Padding is not predicted and does not predict.
    padding = ((ids[:, 1:] < 0) | (ids[:, :-1] < 0)).flatten().to(logits.device)
    targets = targets.masked_fill(padding, IGNORED)
    loss = functional.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="sum")
    if bool(loss.isfinite()):
        loss.backward()
    return loss.detach()


def not_finite(layer: int, what: str, dtype: torch.dtype) -> ValueError:
    """The error of a layer whose `what` (activations or gradients) left the range of the dtype."""
    return ValueError(f"layer {layer}: {what} of a window are not finite in {_range_of(dtype)}")


def check_loss(loss: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a loss that is not finite.

    Raises:
        ValueError: it is not.
    """
    if not bool(loss.isfinite()):
        raise ValueError(f"the loss of a window is {loss.item()} in {_range_of(dtype)}")


def _range_of(dtype: torch.dtype) -> str:
    """A dtype's name, and the remedy for numbers outside its range."""
    remedy = REMEDIES.get(dtype, "are the checkpoint's weights damaged?")
    return f"{str(dtype).removeprefix('torch.')}; {remedy}"


@contextmanager
def failures_explained(
    model: PreTrainedModel, names: Mapping[int, str], ids: torch.Tensor
) -> Iterator[None]:
    """Turn exceptions of the model's own code into one line that names the module.

    Args:
        model: the running model.
        names: id of each of its modules -> its name.
        ids: the batch, [windows, seq_len].
    """
    try:
        yield
    except CannotStreamError:
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory with {ids.shape[0]} windows of {ids.shape[1]} tokens; "
            "use a smaller --batch-size or --seq-len"
        ) from error
    except Exception as error:
        owner = type(model).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__):
            module = frame.f_locals.get("self")
            if names.get(id(module)):
                owner = f"{type(module).__name__} {names[id(module)]}"
        raise ValueError(
            f"{owner}: transformers {transformers.__version__} fails at a window "
            f"({type(error).__name__}: {one_line(error)}){ALL_OF_IT}"
        ) from error
