"""Serve pruned Mixture-of-Experts models in vLLM: experts of any width."""

__version__ = "0.1.0"

_registered = False


def register() -> None:
    """Entry point of `vllm.general_plugins`: make the load format `atomic-pruned` known.

    vLLM calls it in the API server, the engine and every worker, also for people who do not use
    the load format: it runs once, imports vLLM's loader registry and nothing of the layer, and
    never raises.
    What is wrong with a request to serve a pruned model raises in the loader.
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
    """Where requests are admitted to a pruned model: API servers import much, others do not."""
    from vllm_atomic_moe.control import attach_to_api_servers

    attach_to_api_servers()
