"""`heapr`: the score file of the HEAPr authors' tool (arXiv 2509.22299), saved by torch.

A dictionary, decoder layer -> flat float tensor [E·I], expert after expert: the loss increase of
removing the atom, so the lowest are removed first, over all layers together. The tool writes -1 for
the atoms of an expert that no calibration token reached; it removes them first, and so do we.

The file is unpickled with `weights_only`: tensors and plain containers, no code.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.convert.importing.reading import check_every_layer, layer_keys
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.masks import LayerScores, Masks
from vllm_atomic_moe.scoring.pruning import make_profile
from vllm_atomic_moe.scoring.score_file import Scores

METHOD = "heapr"
UNSEEN = -1.0


def read_heapr(path: Path, model: CheckpointInfo, ratio: float) -> Masks:
    """Remove the `ratio` of atoms with the lowest scores, as `atomic-moe prune` does.

    Raises:
        ValueError: the file needs more than tensors and containers, a layer is missing or occurs
            twice, a tensor has another size or holds NaN.
    """
    data = _load(path)
    scores = {
        layer: _score(data[key], model, f"{path}: layer {layer}")
        for layer, key in layer_keys(data, model, path).items()
    }
    check_every_layer(scores, model, path)
    layers = {layer: LayerScores(score_EI) for layer, score_EI in scores.items()}
    profile = make_profile(Scores(METHOD, {}, model.identity(), {}, layers), ratio, METHOD)
    # The file does not say how the scores were made; an empty object would mean "no options".
    metadata = {key: value for key, value in profile.metadata.items() if key != "calibration"}
    return Masks(profile.keep, profile.routable, metadata, _warnings(scores))


def _load(path: Path) -> dict[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle can fail in any way
        # torch's own message recommends running the file's code, so it is not passed on.
        raise ValueError(
            f"{path}: not a file of tensors that torch loads without running code "
            f"({type(error).__name__}); save a plain dictionary, layer -> tensor, with torch.save"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds {type(data).__name__}, wanted a dictionary of tensors")
    return data


def _score(tensor: Any, model: CheckpointInfo, where: str) -> torch.Tensor:
    shape = (model.num_experts, model.intermediate_size)
    atoms = shape[0] * shape[1]
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"{where}: {type(tensor).__name__}, wanted a dense tensor of {atoms}")
    if not tensor.is_floating_point() or tuple(tensor.shape) not in ((atoms,), shape):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where}: {dtype} {list(tensor.shape)}, wanted floating point [{atoms}], "
            f"{shape[0]} experts of {shape[1]} atoms; was it made for another model?"
        )
    score_EI = tensor.detach().float().reshape(shape)
    broken = (~score_EI.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        value = tensor.detach().reshape(shape)[broken[0]]
        worst = value[~score_EI[broken[0]].isfinite()][0].item()
        raise ValueError(
            f"{where}: expert {broken[0]} has a score {worst}, wanted finite float32 numbers; "
            "calibrate and score again"
        )
    return score_EI


def _warnings(scores: dict[int, torch.Tensor]) -> tuple[str, ...]:
    return tuple(
        f"layer {layer}: experts {shorten(unseen)} score -1, no calibration token reached them; "
        "they are removed first"
        for layer, score_EI in sorted(scores.items())
        if (unseen := (score_EI == UNSEEN).all(dim=1).nonzero().flatten().tolist())
    )


IMPORTER = Importer(read_heapr, "HEAPr's scores, saved by torch", needs_ratio="all atoms")
