"""Probes of the vLLM internals that we use: a failing probe names the one that moved.

Names are `module:attribute`, looked up by the probe itself, so that a missing one fails alone.
Nothing starts an engine. To run this against another vLLM, see patches/README.md.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import call

import pytest
import torch
import vllm
from packaging.requirements import Requirement

import vllm_atomic_moe
from vllm_atomic_moe.control import models as admin_models
from vllm_atomic_moe.engine import compat, layer, requests
from vllm_atomic_moe.measure import server_benchmark

LAYERS = "vllm.model_executor.layers"
MOE = f"{LAYERS}.fused_moe"
GPT_OSS = "vllm.model_executor.models.gpt_oss"
EXPERTS = f"{MOE}.routed_experts:RoutedExperts"
METHOD = f"{MOE}.fused_moe_method_base:FusedMoEMethodBase"
ROUTER = f"{MOE}.router.base_router:BaseRouter"
RUNNER = f"{MOE}.runner.moe_runner:MoERunner"
MAP = f"{MOE}.expert_map_manager:ExpertMapManager"
LOADERS = "vllm.model_executor.model_loader"
LOADER = f"{LOADERS}.base_loader:BaseModelLoader"
CLIENT = "vllm.v1.engine.async_llm:AsyncLLM"
ENGINES = "vllm.v1.engine.core_client:AsyncMPClient"
OFFLINE = "vllm.v1.engine.llm_engine:LLMEngine"
INPUT = "vllm.v1.engine.input_processor:InputProcessor"
CORE = "vllm.v1.engine.core:EngineCore"
CORE_PROCESS = f"{CORE}Proc"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SCHEDULED = "vllm.v1.core.sched.output"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
SERVING = "vllm.entrypoints.serve.engine.serving:BaseServing"
APPLICATION = "vllm.entrypoints.launchers.app"
MARK = "vllm.lora.request:LoRARequest"
PLUGIN = "vllm.plugins.endpoint_plugins.interface:EndpointPlugin"

# Methods that ours replace: name -> all of its parameters.
OVERRIDDEN = {
    f"{EXPERTS}._get_quant_method": "self prefix quant_config moe_config",
    f"{EXPERTS}.load_weights": "self weights",
    f"{EXPERTS}.weight_loader": "self param loaded_weight weight_name shard_id expert_id "
    "return_success",
    f"{GPT_OSS}:GptOssRoutedExperts.weight_loader": "self param loaded_weight weight_name shard_id "
    "expert_id return_success",
    f"{METHOD}.create_weights": "self layer num_experts hidden_size "
    "intermediate_size_per_partition params_dtype extra_weight_attrs",
    f"{METHOD}.process_weights_after_loading": "self layer",
    f"{METHOD}.get_fused_moe_quant_config": "self layer",
    f"{METHOD}.apply": "self layer x topk_weights topk_ids shared_experts shared_experts_input",
    f"{ROUTER}._compute_routing": "self hidden_states router_logits indices_type input_ids",
    f"{RUNNER}._maybe_dispatch": "self hidden_states router_logits",
    f"{LOADER}.__init__": "self load_config",
    f"{LOADER}.download_model": "self model_config",
    f"{LOADER}.load_model": "self vllm_config model_config prefix",
    f"{LOADER}.create_model": "self vllm_config model_config prefix",
    f"{LOADER}.load_weights": "self model model_config",
    f"{CORE}._initialize_kv_caches": "self vllm_config",
    f"{CORE}.preprocess_add_request": "self request",
    f"{RUNNER_V1}._prepare_inputs": "self scheduler_output num_scheduled_tokens",
    f"{MODELS}.init_static_loras": "self",
    f"{SERVING}._check_model": "self request",
    f"{APPLICATION}:init_entrypoints_middleware": "args app supported_tasks",
    f"{PLUGIN}.attach_router": "self app",
    f"{PLUGIN}.init_state": "self engine_client state args",
}

# The same for methods with further parameters that ours pass through: name -> first parameters.
WRAPPED = {
    f"{INPUT}.__init__": "self vllm_config",
    f"{INPUT}.process_inputs": "self request_id prompt params",
    f"{OFFLINE}.__init__": "self vllm_config",
    f"{RUNNER_V1}.execute_model": "self scheduler_output",
    f"{RUNNER_V2}.execute_model": "self scheduler_output",
    f"{RUNNER_V2}.prepare_inputs": "self",
    f"{SERVING}._maybe_get_adapters": "self request",
}

# What we call: name -> how.
CALLED = {
    f"{METHOD}.__init__": call("self", "moe_config"),
    f"{MAP}.is_local_expert": call("self", 0),
    f"{LAYERS}.quantization.base_config:resolve_quant_method": call("config", "layer", "prefix"),
    "vllm.model_executor.models.utils:extract_layer_index": call("layer_name"),
    "vllm.model_executor.model_loader.utils:get_model_architecture": call("model_config"),
    f"{LOADERS}:register_model_loader": call("load_format"),
    f"{LOADERS}:get_model_loader": call("load_config"),
    "vllm.config:ModelConfig.get_layers_start_end_indices": call("self", "parallel_config"),
    "vllm.config:ModelConfig.get_total_num_hidden_layers": call("self"),
    "vllm.distributed:get_world_group": call(),
    "vllm.distributed:cleanup_dist_env_and_memory": call(),
    "vllm.logger:init_logger": call("name"),
    # A request's profile, and changes.
    f"{MARK}": call("name", 1, "path"),
    "vllm.v1.worker.worker_base:WorkerBase.get_model": call("self"),
    "vllm.v1.executor.abstract:Executor.collective_rpc": call("self", "method", args=("verb", {})),
    f"{SCHEDULER}.finish_requests": call("self", ["request"], "status"),
    f"{CORE_PROCESS}._send_abort_outputs": call("self", ["request"]),
    f"{ENGINES}._call_utility_async": call("self", "method", "verb", {}, engine=b"engine"),
    "vllm.v1.engine.core_client:SyncMPClient.call_utility": call("self", "method", "verb", {}),
    f"{MODELS}.is_base_model": call("self", "name"),
    f"{MODELS}.model_name": call("self"),
    f"{SERVING}.create_error_response": call(ValueError()),
    # Measuring.
    "vllm:LLM.generate": call("self", ["prompt"], "sampling_params", use_tqdm=False),
    "vllm:SamplingParams": call(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
    "vllm.v1.engine.core_client:EngineCoreClient.shutdown": call("self"),
    "vllm._custom_ops:cpu_prepack_moe_weight": call("weight", "isa"),
    "vllm._custom_ops:cpu_fused_moe": call(
        *("out", "x", "w13", "w2", None, None, "topk_weights", "topk_ids", "activation", "isa")
    ),
    f"{MOE}.experts.cpu_moe:X86CPUUnquantizedExperts._supports_current_device": call(),
}

# Attributes that we read or write: class -> attributes.
HELD = {
    EXPERTS: "apply_router_weight_on_input e_score_correction_bias expert_map_manager "
    "global_num_experts layer_name moe_config quant_method",
    METHOD: "moe_quant_config",
    RUNNER: "do_naive_dispatch_combine routed_experts router",
    MAP: "num_fused_shared_experts",
    f"{MOE}.config:FusedMoEConfig": "activation activation_situ_beta "
    "activation_situ_linear_beta dp_size experts_per_token has_bias in_dtype intermediate_size "
    "moe_parallel_config num_experts router_logits_dtype swiglu_alpha swiglu_beta swiglu_limit",
    f"{MOE}.config:FusedMoEParallelConfig": "is_sequence_parallel tp_rank tp_size",
    f"{MOE}.activation:MoEActivation": "GELU_TANH RELU2_NO_MUL SILU SITU SWIGLUOAI "
    "SWIGLUOAI_UNINTERLEAVE SWIGLUSTEP",
    f"{MOE}.experts.cpu_moe:CPUUnquantizedExperts": "isa",
    "vllm.config:VllmConfig": "additional_config compilation_config device_config "
    "kv_transfer_config load_config lora_config model_config offload_config parallel_config "
    "scheduler_config weight_transfer_config",
    "vllm.config:SchedulerConfig": "max_num_batched_tokens",
    "vllm.config:ModelConfig": "dtype enable_sleep_mode is_moe model model_weights revision "
    "runner_type",
    "vllm.config:LoadConfig": "device download_dir load_format model_loader_extra_config",
    "vllm.config:DeviceConfig": "device",
    "vllm.config:CompilationConfig": "cudagraph_mode inductor_compile_config "
    "max_cudagraph_capture_size mode",
    "vllm.config:CompilationMode": "NONE",
    "vllm.config:CUDAGraphMode": "NONE",
    "vllm.config:OffloadConfig": "prefetch uva",
    "vllm.config.offload:PrefetchOffloadConfig": "offload_group_size",
    "vllm.config.offload:UVAOffloadConfig": "cpu_offload_gb",
    "vllm.config:ParallelConfig": "all2all_backend data_parallel_size "
    "decode_context_parallel_size distributed_executor_backend enable_elastic_ep enable_eplb "
    "expert_placement_strategy nnodes pipeline_parallel_size prefill_context_parallel_size "
    "use_ubatching",
    "vllm.platforms.interface:Platform": "device_name is_cpu is_cuda",
    "vllm.distributed.parallel_state:GroupCoordinator": "cpu_group is_first_rank world_size",
    # A request's profile, and changes.
    CLIENT: "dead_error engine_core errored input_processor vllm_config",
    ENGINES: "client_index core_engines",
    CORE: "model_executor scheduler",
    SCHEDULER: "requests running",
    "vllm.v1.request:Request": "lora_request request_id",
    "vllm.v1.request:RequestStatus": "FINISHED_ABORTED",
    "vllm.v1.engine:EngineCoreRequest": "lora_request sampling_params",
    MARK: "base_model_name lora_int_id lora_name lora_path",
    f"{SCHEDULED}:SchedulerOutput": "finished_req_ids scheduled_new_reqs",
    f"{SCHEDULED}:NewRequestData": "lora_request req_id",
    "vllm.v1.worker.worker_base:WorkerBase": "model_runner",
    RUNNER_V1: "input_batch",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_ids",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "num_tokens query_start_loc req_ids",
    "vllm:SamplingParams": "extra_args",
    "vllm:PoolingParams": "extra_kwargs",
    MODELS: "base_model_paths engine_client input_processor lora_requests",
    SERVING: "models",
    "vllm.entrypoints.openai.completion.protocol:CompletionRequest": "model vllm_xargs",
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": "model vllm_xargs",
    "vllm.entrypoints.openai.responses.protocol:ResponsesRequest": "model vllm_xargs",
    PLUGIN: "name required_tasks",
    # Measuring.
    "vllm:LLM": "llm_engine",
    OFFLINE: "engine_core input_processor vllm_config",
    "vllm.v1.engine.core_client:InprocClient": "engine_core",
    "vllm.engine.arg_utils:EngineArgs": "disable_log_stats dtype enable_prefix_caching "
    "enforce_eager load_format max_model_len model_loader_extra_config",
    "vllm.outputs:RequestOutput": "prompt_logprobs prompt_token_ids",
    "vllm.logprobs:Logprob": "logprob",
}

# Facts that only the source shows: name, text of its source, and what we build on it.
SAID = [
    (f"{LOADERS}.utils:process_weights_after_loading", "quant_method.process_weights_after_loading",
     "routing masks and the kernel's arguments are bound there, when all weights have arrived"),
    ("vllm.config:VllmConfig.compute_hash", "self.additional_config",
     "compile caches must not outlive profiles"),
    (f"{LOADERS}.runai_streamer_loader", "model_config.model_weights",
     "exported checkpoints empty it, so that the streamer reads their own folder"),
    ("vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model",
     "mode == CompilationMode.NONE:\n            return",
     "why eager pipelines are refused on CPU: once it runs, serve them (`unserved.py`)"),
    # A request's profile.
    (f"{OFFLINE}.add_request", "lora_request=lora_request", "ours takes it by keyword"),
    (f"{CLIENT}.add_request", "lora_request=lora_request", "ours takes it by keyword"),
    (f"{INPUT}.process_inputs", "self._validate_lora(lora_request)",
     "marks go around it: where it is gone, they need not"),
    ("vllm.v1.engine.core_client:InprocClient.add_request", "preprocess_add_request(",
     "every request of an engine in this process is admitted"),
    (f"{CORE_PROCESS}.process_input_sockets", "self.preprocess_add_request(",
     "every request of an engine in a process of its own is admitted"),
    (f"{CORE_PROCESS}.process_input_sockets", "self._handle_request_preproc_error(",
     "a request that is not admitted ends alone"),
    (f"{CORE}.preprocess_add_request", "core_request(request, self.request_block_hasher)",
     "a request is admitted before its block hashes are made"),
    ("vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
     '("lora", lora_request.lora_name, lora_request.lora_path)',
     "blocks of different profiles never have the same hash"),
    (f"{SCHEDULED}:NewRequestData.from_request", "lora_request=request.lora_request",
     "workers see the mark of every new request"),
    ("vllm.v1.worker.gpu_worker", "self.model_runner.execute_model(",
     "a wrapper on the runner itself is what workers call"),
    (f"{RUNNER_V1}.execute_model", "_prepare_inputs(scheduler_output, num_scheduled_tokens_np)",
     "the batch has its final order there"),
    (RUNNER_V1, "len(self.input_batch.lora_id_to_lora_request)",
     "why marks are taken off before it sees them"),
    (f"{RUNNER_V2}.execute_model", "input_batch = self.prepare_inputs(",
     "the batch has its final order there"),
    (f"{RUNNER}._maybe_dispatch", "dispatch_router_logits(",
     "slots travel as one more column of what data parallel ranks gather"),
    ("vllm.entrypoints.launchers.api_server.app_state",
     "await state.openai_serving_models.init_static_loras()",
     "API servers learn the profiles there, before the first request"),
    (f"{APPLICATION}:build_app", "init_entrypoints_middleware(args, app, supported_tasks)",
     "where every route's middleware comes from"),
    # Changes.
    ("vllm.v1.serial_utils:run_method", "getattr(obj, method)", "`atomic_moe_rank` by name"),
    ("vllm.v1.executor.ray_executor_v2", "class RayExecutorV2(MultiprocExecutor)",
     "its `collective_rpc` reaches every rank over Ray, too"),
    (f"{CORE_PROCESS}._handle_client_request", "getattr(self, method_name)",
     "`atomic_moe` by name"),
    (f"{CORE_PROCESS}._invoke_utility_method", "if isinstance(result, Future):",
     "`follow` and `taken` answer later, and the engine goes on meanwhile"),
    # The admin endpoint.
    ("vllm.plugins:load_endpoint_plugins", "if envs.VLLM_PLUGINS is None",
     "the endpoint is off unless it is named"),
    ("vllm.entrypoints.launchers.app", "app.state.args = args", "serving keys are read there"),
    ("vllm.entrypoints.serve.middleware.register", "args.api_key or [envs.VLLM_API_KEY]",
     "where serving keys come from"),
    # Log lines that the benchmark of servers reads.
    ("vllm.v1.worker.cpu_model_runner", "Starting to load model %s", "a load begins, CPU"),
    ("vllm.v1.worker.cpu_model_runner", "Warming up model", "a load has ended, CPU"),
    ("vllm.v1.worker.gpu_model_runner", "Model loading took %s GiB memory and %.6f seconds",
     "time and memory of a load, GPU"),
    ("vllm.v1.worker.gpu.model_runner", "Model loading took %s GiB memory and %.6f seconds",
     "time and memory of a load, GPU"),
    ("vllm.v1.core.kv_cache_utils", "KV cache size: %s tokens", "room for tokens"),
    ("vllm.v1.worker.cpu_worker", "Explicitly set ({", "room in GiB, CPU"),
    ("vllm.v1.worker.cpu_worker", "Auto set ({", "room in GiB, CPU"),
    ("vllm.v1.worker.gpu_worker", "Available KV cache memory: %s GiB", "room in GiB, GPU"),
    ("vllm.v1.engine.utils", "Engine core initialization failed", "a consequence, not the cause"),
    ("vllm.v1.executor.multiproc_executor", "WorkerProc initialization failed",
     "a consequence, not the cause"),
]  # fmt: skip

# Reasons to refuse a routing mask, by the attribute that shows them: router -> attributes.
ROUTER_ATTRIBUTES = {
    "CPURouter": "scoring_func e_score_correction_bias use_grouped_topk num_expert_group "
    "topk_group custom_routing_function _hash_indices_table",
    "FusedTopKRouter": "scoring_func",
    "FusedTopKBiasRouter": "scoring_func e_score_correction_bias _hash_indices_table",
    "GroupedTopKRouter": "scoring_func e_score_correction_bias num_expert_group topk_group",
}


# Features that vLLM lacks, so that we refuse or did not try them: a probe fails once vLLM has one.
NOT_YET = {
    "data parallelism on CPU: drop its refusal in `unserved.py`": (
        lambda: not compat.cpu_ranks_can_gather()
    ),
    "Ray on CPU: try the Ray overlays, and say so in the README": (
        lambda: not resolve_name("vllm.platforms.cpu:CpuPlatform").ray_device_key
    ),
}


def source(name: str) -> str:
    """Source of a module, without an import (it may need a GPU), or of a part of it."""
    if ":" in name:
        return inspect.getsource(resolve_name(name))
    return Path(find_spec(name).origin).read_text()


def holds(owner: type, name: str) -> bool:
    """Whether objects of this class have the attribute: declared, or assigned by a method."""
    classes = [cls for cls in owner.__mro__ if cls.__module__.startswith("vllm.")]
    return hasattr(owner, name) or any(
        name in inspect.get_annotations(cls)
        or re.search(rf"self\.{name}(, self\.\w+)*( = |: \w)", inspect.getsource(cls))
        for cls in classes
    )


def held(names: dict[str, str]) -> list[tuple[str, str]]:
    """(owner, attribute) of a table."""
    return [(owner, name) for owner, listed in names.items() for name in listed.split()]


@pytest.mark.parametrize(("name", "parameters"), OVERRIDDEN.items(), ids=OVERRIDDEN)
def test_overridden(name, parameters):
    assert " ".join(inspect.signature(resolve_name(name)).parameters) == parameters, name


@pytest.mark.parametrize(("name", "first"), WRAPPED.items(), ids=WRAPPED)
def test_wrapped(name, first):
    parameters = " ".join(inspect.signature(resolve_name(name)).parameters)
    assert f"{parameters} ".startswith(f"{first} "), f"{name}: {parameters}"


@pytest.mark.parametrize("news", NOT_YET)
def test_not_yet(news):
    assert NOT_YET[news](), f"vLLM serves {news}"


@pytest.mark.parametrize(("name", "how"), CALLED.items(), ids=CALLED)
def test_called(name, how):
    try:
        inspect.signature(resolve_name(name)).bind(*how.args, **how.kwargs)
    except TypeError as error:
        pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize(("owner", "name"), held(HELD))
def test_held(owner, name):
    assert holds(resolve_name(owner), name), f"{owner}.{name}"


@pytest.mark.parametrize(("name", "text", "reason"), SAID, ids=[name for name, *_ in SAID])
def test_said(name, text, reason):
    assert text in source(name), f"{name}: {reason}"


def test_runner_asks_its_router_in_one_place():
    """A routing mask applies inside that call: a second path would bypass it."""
    assert source(RUNNER).count("self.router.select_experts(") == 1
    for step in (f"{MOE}.router.fused_moe_router:FusedMoERouter.select_experts", ROUTER):
        assert len(re.findall(r"= self\._(select_experts|compute_routing)\(", source(step))) == 1
    assert holds(compat.FusedMoERouter, "bias_vl")


@pytest.mark.parametrize(("router", "name"), held(ROUTER_ATTRIBUTES))
def test_known_router_holds(router, name):
    known = {cls.__name__: cls for cls in compat.KNOWN_ROUTERS}
    assert known.keys() == ROUTER_ATTRIBUTES.keys()
    assert holds(known[router], name), f"{router}.{name}"
    assert holds(known[router], "top_k"), router
    assert known[router].select_experts is compat.FusedMoERouter.select_experts, router


def test_known_routers_choose_by_logits_and_bias_only():
    """A new argument of a router may change its choice: read the code before widening this."""
    arguments = {
        name
        for router in compat.KNOWN_ROUTERS
        for name in inspect.signature(router.__init__).parameters
    }
    assert arguments == {
        "self",
        "top_k",
        "global_num_experts",
        "eplb_state",
        "renormalize",
        "scoring_func",
        "routed_scaling_factor",
        "use_grouped_topk",
        "num_expert_group",
        "topk_group",
        "e_score_correction_bias",
        "custom_routing_function",
        "hash_indices_table",
        "num_fused_shared_experts",
        "shared_expert_weight",
        "bias_vl",
        "image_sentinel_lo",
        "skip_padding",
    }


def test_checkpoint_tensors_arrive_under_our_names():
    mapping = compat.RoutedExperts.build_expert_params_mapping(
        "gate_proj", "down_proj", "up_proj", num_experts=1, routed_experts_prefix=""
    )
    assert {shard for *_, shard in mapping} == layer.SHARD_PROJECTIONS.keys()
    parameters = {f"{name.removeprefix('experts.')}weight" for name, *_ in mapping}
    assert parameters == set(layer.PLACEHOLDERS)


def test_loading_keeps_its_order():
    """Built, then filled, then finished: each step relies on the one before."""
    steps = ("self.create_model(", "self.load_weights(", "process_weights_after_loading(")
    places = [source(f"{LOADER}.load_model").find(step) for step in steps]
    assert -1 not in places, places
    assert places == sorted(places)


def test_replacement_is_for_the_block_only():
    class Mine(compat.RoutedExperts):
        def __init__(self, *arguments):
            torch.nn.Module.__init__(self)

    with compat.routed_experts_replaced_by(Mine):
        assert type(compat.RoutedExperts("anything")) is Mine
        with pytest.raises(ValueError, match=r"already replaced by .*Mine"):
            compat.routed_experts_replaced_by(Mine).__enter__()
    from vllm.model_executor.custom_op import op_registry_oot

    assert "RoutedExperts" not in op_registry_oot


def test_plugin_groups_and_attached_methods():
    from vllm import plugins

    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    assert plugins.ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    vllm_atomic_moe.register()
    assert resolve_name("vllm.v1.worker.worker_base:WorkerBase.atomic_moe_rank")
    assert resolve_name(f"{CORE}.atomic_moe")


def test_input_processor_takes_the_mark_by_keyword():
    """Ours is keyword-only, and passes further positional arguments on."""
    inside = inspect.signature(inspect.unwrap(resolve_name(f"{INPUT}.process_inputs")))
    assert "lora_request" in inside.parameters
    inside.bind("self", "id", "prompt", "params", ("generate",), lora_request=None)


def test_refusals_are_client_errors_and_the_front_ends_without_names_are_known():
    from vllm.exceptions import VLLMClientError, VLLMNotFoundError, VLLMValidationError

    for error in (VLLMNotFoundError("message"), VLLMValidationError("message", parameter="model")):
        assert isinstance(error, VLLMClientError)
    assert find_spec("vllm.entrypoints.launchers.grpc_server"), "`attach` looks for its name"
    assert not vllm.envs.VLLM_USE_RUST_FRONTEND


def test_a_deferred_utility_answers_when_its_future_does():
    """The basis of an API server's open call at the engine."""
    from concurrent.futures import Future

    from vllm.v1.engine import UtilityOutput

    invoke = resolve_name(f"{CORE_PROCESS}._invoke_utility_method")
    later, sent = Future(), []
    invoke("follow", lambda: later, UtilityOutput(1), sent.append)
    assert sent == []
    later.set_result({"ok": True})
    assert [output.result.result for output in sent] == [{"ok": True}]


def test_marks_cross_processes():
    """As vLLM's engine core receives them, and not the LoRA machinery's idea of equality."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    lora_request = resolve_name(MARK)
    served = requests.Served(3, "a", {"a": requests.Loaded(5, "d1", 7)})
    mark = served.mark("a", shown="model:a")
    frames = MsgpackEncoder().encode(mark)
    read = MsgpackDecoder(lora_request).decode(frames)
    assert (read.lora_name, read.lora_path) == ("model:a", "atomic-profile:a:d1")
    assert (requests.profile_of(read), requests.slot_of(read)) == ("a", 5)
    assert requests.Served.of(served.plain()) == served


def test_errors_have_the_shape_of_vllm():
    theirs = "vllm.entrypoints.serve.engine.protocol"
    for name in ("ErrorInfo", "ErrorResponse"):
        fields = resolve_name(f"{theirs}:{name}").model_fields.keys()
        assert fields == getattr(admin_models, name).model_fields.keys(), name


def test_load_generator_takes_our_flags():
    """`vllm bench serve`, and the figures that we read from its result."""
    parser = ArgumentParser()
    resolve_name("vllm.benchmarks.serve:add_cli_args")(parser)
    ours = inspect.getsource(server_benchmark._Bench._load)
    flags = set(re.findall(r'"([a-z-]+)":', ours)) | set(re.findall(r'"--([a-z-]+)"', ours))
    assert len(flags) > 10
    assert not {f"--{flag}" for flag in flags} - parser._option_string_actions.keys()
    written = source("vllm.benchmarks.serve")
    read = re.findall(r'found\["(\w+)"\]', inspect.getsource(server_benchmark))
    assert not [figure for figure in read if f'"{figure}"' not in written]


def test_supported_range_is_the_one_probed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (wanted,) = (Requirement(line) for line in project["dependencies"] if line.startswith("vllm"))
    assert vllm.__version__ in wanted.specifier
    release = vllm.__version__.split(".")[:2]
    assert release in (["0", "32"], ["0", "33"]), "probe anew, then widen it in pyproject.toml"


def test_experts_classes_of_models_own_differ_in_loading_only():
    """Classes that `check_layer` accepts: they define only how weights arrive."""
    from vllm.model_executor.models import dbrx, gpt_oss

    from vllm_atomic_moe.engine import compat

    loading = {"__init__", "weight_loader", "get_expert_mapping"}
    for special in (dbrx.DbrxExperts, gpt_oss.GptOssRoutedExperts):
        assert special.__name__ in compat.KNOWN_EXPERTS
        own = {name for name, it in vars(special).items() if inspect.isfunction(it)}
        assert {name for name in own if "load" not in name} <= loading, own
    assert len(compat.KNOWN_EXPERTS) == 2
