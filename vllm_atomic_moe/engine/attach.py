"""Hooks that the plug-in attaches to vLLM when it registers, and its calls to vLLM's engines.

Every vLLM process imports this file, so vLLM's internals are imported inside the functions.
`tests/serving/test_compat.py` probes them. The wrapped methods change nothing for a model with
another load format.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from vllm_atomic_moe.engine import LOAD_FORMAT
from vllm_atomic_moe.engine.unserved import CONFIGURATION, refuse


def attach_to_engines() -> None:
    """Give requests their profiles, and workers and engine cores the methods for changes.

    Reasons: `worker_extension_cls`, the public way for workers, is a user's option, and there is
    none for the engine core, which makes block hashes and knows the waiting requests.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_atomic_moe.engine import core, worker

    setattr(WorkerBase, worker.RANK, worker.rank)
    setattr(EngineCore, core.CORE, core.core_call)

    # Not __init__: an engine core in its own process loads the plug-ins inside __init__.
    initialize = EngineCore._initialize_kv_caches

    @functools.wraps(initialize)
    def initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        answer = initialize(self, vllm_config)
        if is_ours(vllm_config):
            self.atomic_moe_profiles = core.CoreProfiles(self)
        return answer

    preprocess = EngineCore.preprocess_add_request

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        profiles = getattr(self, "atomic_moe_profiles", None)
        if profiles is not None:
            profiles.admit(request)  # before the block hashes
        return preprocess(self, request)

    add = EngineCore.add_request

    @functools.wraps(add)
    def add_request(self: Any, request: Any, request_wave: int = 0) -> Any:
        profiles = getattr(self, "atomic_moe_profiles", None)
        if profiles is None or profiles.served.holds(request.lora_request):
            return add(self, request, request_wave)
        # Unloaded since the input thread saw it: its client is gone, or lost the race.
        if hasattr(self, "_send_error_outputs_to_client"):
            self._send_error_outputs_to_client([request.request_id], request.client_index)
        return None

    EngineCore._initialize_kv_caches = initialize_kv_caches
    EngineCore.preprocess_add_request = preprocess_add_request
    EngineCore.add_request = add_request


def attach_to_front_ends(on_front_end: Callable[[], None]) -> None:
    """Let the processes that admit requests mark them.

    Reason: vLLM refuses its own way to carry a name with a request if LoRA is off.

    Args:
        on_front_end: called in such a process, before its engine starts.
    """
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_atomic_moe.engine import requests

    process = InputProcessor.process_inputs
    signature = inspect.signature(process)

    @functools.wraps(process)
    def process_inputs(self: Any, *given: Any, **named: Any) -> Any:
        admission = getattr(self, "atomic_moe_admission", None)
        if admission is None:
            return process(self, *given, **named)
        call = signature.bind(self, *given, **named)
        mark = admission.mark_for(call.arguments.get("lora_request"), call.arguments["params"])
        profile = requests.profile_of(mark)
        if profile is not None:
            call.arguments["lora_request"] = None  # skips the check that LoRA is on
        request = process(*call.args, **call.kwargs)
        if profile is not None:
            request.lora_request = mark
            admission.admitted(profile)
        return request

    init_processor = InputProcessor.__init__

    @functools.wraps(init_processor)
    def init_input_processor(self: Any, vllm_config: Any, *rest: Any, **named: Any) -> None:
        if is_ours(vllm_config):
            grpc = "vllm.entrypoints.launchers.grpc_server" in sys.modules
            refuse(CONFIGURATION, {"the gRPC front end": grpc})
        init_processor(self, vllm_config, *rest, **named)
        if is_ours(vllm_config):
            on_front_end()

    start = LLMEngine.__init__

    @functools.wraps(start)
    def init_llm_engine(self: Any, vllm_config: Any, *rest: Any, **named: Any) -> None:
        start(self, vllm_config, *rest, **named)
        if is_ours(vllm_config):
            served = requests.Served.of(_ask_core(self.engine_core, "describe")["served"])
            self.input_processor.atomic_moe_admission = requests.Admission(served)

    InputProcessor.__init__ = init_input_processor
    InputProcessor.process_inputs = process_inputs
    LLMEngine.__init__ = init_llm_engine


def is_ours(vllm_config: Any) -> bool:
    """Whether the model uses our load format."""
    return vllm_config.load_config.load_format == LOAD_FORMAT


def _ask_core(client: Any, verb: str) -> Mapping[str, Any]:
    """The answer of an offline engine's core, in this process or another."""
    if hasattr(client, "call_utility"):
        return client.call_utility("atomic_moe", verb, {})
    return client.engine_core.atomic_moe(verb, {})


def end_requests(core: Any, requests: Sequence[str]) -> int:
    """End requests of an engine core and tell their API servers; return their number."""
    from vllm.v1.request import RequestStatus

    ended = core.scheduler.finish_requests(requests, RequestStatus.FINISHED_ABORTED)
    if hasattr(core, "_send_abort_outputs"):  # not where the core is in its caller's process
        core._send_abort_outputs(ended)
    return len(ended)


def engines_of(client: Any) -> list[Any]:
    """The engines of an asynchronous engine client, in order of their ranks."""
    return list(client.engine_core.core_engines)


async def call_engine(client: Any, engine: Any, verb: str, arguments: Mapping[str, Any]) -> Any:
    """The answer of one engine's core.

    Reason: the engine client has methods for vLLM's own utilities only, and under data parallelism
    `call_utility_async` returns the first engine's answer, whatever the others say.
    """
    return await client.engine_core._call_utility_async(
        "atomic_moe", verb, arguments, engine=engine
    )


def server_index(client: Any) -> int:
    """The index of this API server among those of the same engines."""
    return client.engine_core.client_index


def attach_to_api_servers(start: Callable[[Any], Awaitable[Any]], middleware: type) -> None:
    """Let API servers resolve the profile of a request, and name it in a header.

    Reasons: vLLM resolves model names in these methods and has no hook there; endpoint plug-ins,
    the public way to extend its application, are off unless VLLM_PLUGINS names them.

    Args:
        start: vLLM's OpenAIServingModels of an engine of ours -> the profiles that it offers, with
            `known(request)` and `resolve(request)`.
        middleware: ASGI middleware for every route.
    """
    from vllm.entrypoints.launchers import app as application
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMClientError

    add_middleware = application.init_entrypoints_middleware
    init = OpenAIServingModels.init_static_loras
    check = BaseServing._check_model
    adapters = BaseServing._maybe_get_adapters

    @functools.wraps(add_middleware)
    def init_entrypoints_middleware(args: Any, app: Any, supported_tasks: Any) -> None:
        add_middleware(args, app, supported_tasks)
        app.add_middleware(middleware)

    @functools.wraps(init)
    async def init_static_loras(self: Any) -> None:
        await init(self)
        if is_ours(self.engine_client.vllm_config):
            profiles = self.atomic_moe_profiles = await start(self)
            self.input_processor.atomic_moe_admission = profiles

    @functools.wraps(check)
    async def check_model(self: Any, request: Any) -> Any:
        profiles = getattr(self.models, "atomic_moe_profiles", None)
        error = await check(self, request)
        if error is None and profiles is not None:
            try:
                profiles.resolve(request)
            except VLLMClientError as refusal:
                return self.create_error_response(refusal)
        return error

    @functools.wraps(adapters)
    def maybe_get_adapters(self: Any, request: Any, *given: Any, **named: Any) -> Any:
        profiles = getattr(self.models, "atomic_moe_profiles", None)
        if profiles is None:
            return adapters(self, request, *given, **named)
        if (known := profiles.known(request)) is None:
            adapters(self, request, *given, **named)  # raises what is unknown
        return known or profiles.resolve(request)

    application.init_entrypoints_middleware = init_entrypoints_middleware
    OpenAIServingModels.init_static_loras = init_static_loras
    BaseServing._check_model = check_model
    BaseServing._maybe_get_adapters = maybe_get_adapters
