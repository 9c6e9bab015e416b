"""The engine's side: the loader, the layer, routing, refusals, and vLLM's internals."""

from typing import Literal

LOAD_FORMAT = "atomic-pruned"

Mode = Literal["wait", "abort"]
"""How a switch treats running requests: let them finish, or end them."""


def register_load_format() -> None:
    """Tell vLLM's loader registry about `--load-format atomic-pruned`, and its workers about the
    switch of profiles.
    """
    from vllm.model_executor.model_loader import register_model_loader

    from vllm_atomic_moe.engine.attach import attach_engine_methods
    from vllm_atomic_moe.engine.loader import AtomicPrunedModelLoader

    register_model_loader(LOAD_FORMAT)(AtomicPrunedModelLoader)
    attach_engine_methods()
