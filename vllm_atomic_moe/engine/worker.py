"""Profiles in one worker: the slot of every token, and what each slot computes.

Each model runner is followed: the scheduler's messages tell which request has which slot, and when
the runner has put a batch in its final order, every token's slot is written into one buffer that
all layers read.

Calls of the engine core arrive through `collective_rpc` as `atomic_moe_rank(verb, arguments)` and
never raise: an exception would leave the other ranks' replies in the queue for the next call. Every
reply is plain data, `{"ok": true, …}` or `{"ok": false, "error": "…"}`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_atomic_moe.engine.options import (
    ResidentProfiles,
    missing_atoms,
    read_profile,
)
from vllm_atomic_moe.engine.requests import profile_of, slot_of
from vllm_atomic_moe.experts.packing import SLOTS
from vllm_atomic_moe.files.profiles import ProfileStore

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

logger = init_logger(f"vllm.{__name__}")

RANK = "atomic_moe_rank"
ATTRIBUTE = "atomic_moe_profiles"
NOT_OURS = "the model was not loaded with --load-format atomic-pruned"
VERBS = ("describe", "memory", "load", "free")

Reply = dict[str, Any]


class RankProfiles:
    """The profiles of one rank's layers."""

    def __init__(
        self,
        resident: ResidentProfiles,
        layers: Sequence[AtomicRoutedExperts],
        token_slots: torch.Tensor,
        model_directory: Path,
        directory: Path,
        dense_bytes: int,
    ) -> None:
        """Describe what is loaded.

        Args:
            resident: the profiles listed at start, in the order of their slots.
            layers: this rank's packed layers, loaded.
            token_slots: int32, the buffer that the layers read.
            model_directory: of the checkpoint.
            directory: of the profile files.
            dense_bytes: of all experts, unpruned, as the checkpoint encodes them.
        """
        self._resident = resident
        self._layers = layers
        self._token_slots = token_slots
        self._model_directory = model_directory
        self._directory = directory
        self._dense_bytes = dense_bytes
        self._union = resident.union()
        self._slots: dict[str, int] = {}

    # --- calls of the engine core -----------------------------------------------------------------

    def describe(self) -> Reply:
        """The profiles loaded at start: the active one, digests and sizes by name, the union of the
        masks and the routing masks as bits by layer, whether any is compensated, and where the
        files are.
        """
        resident = self._resident
        return {
            "active": resident.active,
            "profiles": {
                name: {"digest": profile.digest(), "kept_atoms": profile.kept_atoms}
                for name, profile in resident.profiles.items()
            },
            "directory": str(self._directory),
            "model": str(self._model_directory),
            "atoms": resident.model.atoms,
            "routing": {
                "biased": any(layer.routing.biased for layer in self._layers),
                "masks": {
                    str(layer): [
                        np.packbits(mask.numpy()).tobytes()
                        for mask in resident.routing_masks(layer).values()
                    ]
                    for layer in resident.model.layers
                    if resident.masking
                },
            },
            "compensated": bool(resident.compensated),
            "dense_bytes": self._dense_bytes,
            "union": {
                str(layer): np.packbits(mask.numpy()).tobytes()
                for layer, mask in self._union.items()
            },
        }

    def memory(self) -> Reply:
        """Bytes on this rank, and the number of live tiles of 32 atoms by slot."""
        layers = self._layers
        live_S = torch.zeros(SLOTS, dtype=torch.int64)
        for layer in layers:
            live_S += (layer.packed.bits_SW != 0).sum(dim=1).cpu()
        return {
            "resident_bytes": sum(layer.weight_bytes for layer in layers),
            "index_bytes": sum(layer.index_bytes for layer in layers),
            "tiles": sum(layer.packed.bits_SW.shape[1] for layer in layers),
            "live_tiles": live_S.tolist(),
        }

    def load(self, name: str, slot: int, digest: str) -> Reply:
        """Make a free slot compute a profile of the directory; all of its atoms must be resident.

        Args:
            name: of the profile.
            slot: 0..SLOTS-1; no request uses it.
            digest: the expected one; another rank may see another file.
        """
        model = self._resident.model
        profile = read_profile(ProfileStore(self._directory), name, model)
        profile.check(model)
        if profile.digest() != digest:
            raise ValueError(f"profile {name!r}: its file is not the same everywhere, or changed")
        if missing := missing_atoms(profile, self._union):
            raise ValueError(f"profile {name!r} keeps {missing} atoms that are not in memory")
        try:
            for layer in self._layers:
                layer.set_slot(slot, profile)
        except Exception:
            self.free(slot)
            raise
        return {}

    def free(self, slot: int) -> Reply:
        """Make `slot` compute nothing."""
        for layer in self._layers:
            layer.set_slot(slot, None)
        return {}

    # --- batches ----------------------------------------------------------------------------------

    def note(self, scheduler_output: Any) -> None:
        """Learn the slots of new requests, and take their marks off.

        Model runner V1 counts LoRAs in its batch without asking whether LoRA is on.
        """
        for request in scheduler_output.finished_req_ids:
            self._slots.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            if profile_of(new.lora_request) is not None:
                self._slots[new.req_id] = slot_of(new.lora_request)
                new.lora_request = None

    def slots_of(self, requests: Sequence[str]) -> np.ndarray:
        """Slots of a batch's requests: int32 [R].

        Raises:
            KeyError: the scheduler never sent a mark for one of them.
        """
        return np.fromiter((self._slots[name] for name in requests), np.int32, len(requests))

    def fill_by_counts(self, requests: Sequence[str], counts_R: np.ndarray) -> None:
        """Write the slots of a batch with its tokens in the order of the requests.

        Args:
            requests: in the batch's order.
            counts_R: number of tokens of each.
        """
        slots_T = torch.from_numpy(np.repeat(self.slots_of(requests), counts_R))
        if self._token_slots.is_cuda:  # a new source per batch: the last copy may still run
            slots_T = slots_T.pin_memory()
        self._token_slots[: len(slots_T)].copy_(slots_T, non_blocking=True)

    def fill_by_offsets(self, requests: Sequence[str], first_R1: torch.Tensor, tokens: int) -> None:
        """Write the slots of a batch with a division that only the device knows.

        Args:
            requests: in the batch's order.
            first_R1: integer, at least one more than there are requests: first token of each.
            tokens: their number.
        """
        device = self._token_slots.device
        slots_R = torch.from_numpy(self.slots_of(requests))
        if device.type == "cuda":
            slots_R = slots_R.pin_memory()
        slots_R = slots_R.to(device, non_blocking=True)
        places_T = torch.arange(tokens, dtype=first_R1.dtype, device=device)
        request_T = torch.searchsorted(first_R1[1 : len(requests)], places_T, right=True)
        self._token_slots[:tokens] = slots_R[request_T]


def rank(worker: Any, verb: str, arguments: Mapping[str, Any]) -> Reply:
    """`atomic_moe_rank` of vLLM's workers: answer one call; never raises."""
    try:
        assert verb in VERBS, verb
        profiles = getattr(worker.get_model(), ATTRIBUTE, None)
        if profiles is None:
            return {"ok": False, "error": NOT_OURS}
        if verb == "describe":
            follow_batches(worker.model_runner, profiles)
        return {"ok": True, **getattr(profiles, verb)(**arguments)}
    except Exception as error:
        logger.error("Profiles: %s failed: %s", verb, error, exc_info=not _expected(error))
        return {"ok": False, "error": " ".join(f"{error}".split()) or type(error).__name__}


def _expected(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)


def follow_batches(runner: Any, profiles: RankProfiles) -> None:
    """Write the slots of all future batches of `runner`; call it once per runner.

    Reason for wrapping its methods: the order of a batch is known between the two of them, where
    vLLM fills the buffers of its own LoRA and has no hook. Model runner V1 has `_prepare_inputs`,
    V2 `prepare_inputs`.
    """
    if "execute_model" in vars(runner):
        return
    execute = runner.execute_model

    @functools.wraps(execute)
    def execute_model(scheduler_output: Any, *rest: Any, **named: Any) -> Any:
        profiles.note(scheduler_output)
        return execute(scheduler_output, *rest, **named)

    runner.execute_model = execute_model
    if hasattr(runner, "_prepare_inputs"):
        prepare = runner._prepare_inputs

        @functools.wraps(prepare)
        def prepare_inputs_v1(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
            prepared = prepare(scheduler_output, num_scheduled_tokens)
            profiles.fill_by_counts(runner.input_batch.req_ids, num_scheduled_tokens)
            return prepared

        runner._prepare_inputs = prepare_inputs_v1
    else:
        prepare = runner.prepare_inputs

        @functools.wraps(prepare)
        def prepare_inputs_v2(*given: Any, **named: Any) -> Any:
            batch = prepare(*given, **named)
            profiles.fill_by_offsets(batch.req_ids, batch.query_start_loc, batch.num_tokens)
            return batch

        runner.prepare_inputs = prepare_inputs_v2
