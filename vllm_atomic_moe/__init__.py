"""Serve pruned Mixture-of-Experts models in vLLM: experts of any width."""

__version__ = "0.2.0.dev0"

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: make the load format `atomic-pruned` known.

    vLLM calls it in the API server, the engine and every worker, also for users of other load
    formats: it runs once, imports vLLM's loader registry and nothing of the layer, and never
    raises. Invalid requests raise in the loader.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm_atomic_moe.engine import register_load_format

        register_load_format(_offer_profiles)
    except Exception:
        import logging

        logging.getLogger(__name__).exception(
            "atomic-moe %s could not register its load format with the installed vLLM", __version__
        )


def _offer_profiles() -> None:
    """Called where requests to a pruned model are admitted: only API servers import much."""
    from vllm_atomic_moe.control import attach_to_api_servers

    attach_to_api_servers()
