"""The loader: options, refusals before weights are read, completeness, residency."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoints import COMMON, make_checkpoint, write_profile, zero_pruned
from tests.hub_cache import lay_out
from tests.serving.conftest import (
    check_resident,
    core,
    engine,
    logprobs_of,
    packed_layers_of,
    prompt_logprobs,
)
from vllm_atomic_moe.engine.options import LoaderOptions
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen3-MoE with two ragged profiles that are not nested."""
    directory = tmp_path_factory.mktemp("models") / "model"
    info = make_checkpoint("qwen3_moe", directory)
    for seed, name in enumerate(("narrow", "other"), start=1):
        write_profile(info, name, directory / "atomic_profiles", seed)
    return directory


def configure(model, extra=None, **engine_options):
    """The configuration as `vllm serve` builds it."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {
        "load_format": "atomic-pruned",
        "model_loader_extra_config": {"active": "narrow"} if extra is None else extra,
        "dtype": "float32",
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
    }
    return EngineArgs(str(model), **{**arguments, **engine_options}).create_engine_config()


def load(model, extra=None, **engine_options):
    """Configure and load."""
    from vllm.model_executor.model_loader import get_model

    return get_model(vllm_config=configure(model, extra, **engine_options))


@pytest.fixture
def nothing_packed(monkeypatch):
    """Fail if any expert's weights are allocated."""
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

    def pack(*arguments):
        raise AssertionError("weights were allocated")

    monkeypatch.setattr(AtomicRoutedExperts, "pack", pack)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, r"holds 2 profiles \(narrow, other\); name the one to serve"),
        ({"active": "wide"}, r"profile 'wide' is not in .*; profiles there: narrow, other"),
        ({"active": 3}, r"`active` is 3, wanted a string"),
        ({"active": "narrow", "resident": "other"}, r"`resident` is 'other', wanted a list"),
        ({"active": "narrow", "resident": ["wide"]}, r"profile 'wide' is not in"),
        ({"active": "narrow", "resident": 7}, r"`resident` is 7, wanted a list"),
        ({"active": "narrow", "profiles": "/no/such"}, r"profile directory /no/such does not"),
        ({"active": "narrow", "inner_format": "tensorizer"}, r"`inner_format` is 'tensorizer'"),
        ({"active": "narrow", "kernel": "fast"}, r"`kernel` is 'fast', wanted one of"),
        ({"active": "narrow", "kernel": "triton"}, r"'triton' does not run on cpu; wanted one of"),
        ({"active": "narrow", "actve": "x"}, r"actve.*keys of atomic-pruned are profiles, active"),
        ({"active": "narrow", "num_threads": 0}, r"num_threads must be a positive integer"),
    ],
)
def test_bad_options_are_refused(model, no_weights_read, extra, words):
    with pytest.raises(ValueError, match=words):
        load(model, extra)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"data_parallel_size": 2},
            r"data parallelism on CPU \(vLLM's own: its CPU ranks .*\); start several servers",
        ),
        ({"pipeline_parallel_size": 2}, r"pipelines in eager mode on CPU .*drop --enf"),
        (
            {"enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
            r"round-robin expert placement \(--expert-placement-strategy round_robin\); use linear",
        ),
        (
            {"enable_expert_parallel": True, "all2all_backend": "deepep_low_latency"},
            r"all-to-all kernels between experts \(--all2all-backend deepep_low_latency\)",
        ),
        (
            {"enable_lora": True},
            r"LoRA \(--enable-lora; profiles use its .*\); merge the adapter",
        ),
        (
            {
                "enforce_eager": False,
                "compilation_config": {"inductor_compile_config": {"max_autotune": True}},
            },
            r"max_autotune on CPU",
        ),
    ],
)
def test_features_are_refused_by_name(model, no_weights_read, options, words):
    with pytest.raises(ValueError, match=f"not served by this version: {words}"):
        load(model, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.parallel_config.__setattr__("enable_eplb", True), r"--enable-eplb"),
        (lambda c: c.model_config.__setattr__("enable_sleep_mode", True), r"--enable-sleep-mode"),
        (lambda c: c.__setattr__("weight_transfer_config", object()), r"--weight-transfer-config"),
        (
            lambda c: c.parallel_config.__setattr__("prefill_context_parallel_size", 2),
            r"--prefill-context-parallel-size 2",
        ),
        (
            lambda c: c.parallel_config.__setattr__("decode_context_parallel_size", 2),
            r"decode-context parallelism \(--decode-context-parallel-size 2\); use 1",
        ),
        (lambda c: c.parallel_config.__setattr__("enable_dbo", True), r"--enable-dbo"),
        (lambda c: c.parallel_config.__setattr__("ubatch_size", 2), r"--ubatch-size"),
        (lambda c: c.parallel_config.__setattr__("enable_elastic_ep", True), r"--enable-elastic"),
        (lambda c: c.__setattr__("kv_transfer_config", object()), r"--kv-transfer-config"),
        (
            lambda c: c.parallel_config.__setattr__("data_parallel_external_lb", True),
            r"reach some data parallel engines only \(--data-parallel-rank",
        ),
        (
            lambda c: c.parallel_config.__setattr__("data_parallel_hybrid_lb", True),
            r"--data-parallel-hybrid-lb.*; let vLLM balance the load",
        ),
        (
            lambda c: c.offload_config.uva.__setattr__("cpu_offload_gb", 1.0),
            r"--cpu-offload-gb",
        ),
    ],
)
def test_features_vllm_itself_refuses_on_cpu_are_refused_by_name(model, change, words):
    """vLLM's CPU platform rejects these flags earlier; a GPU machine reaches our refusal."""
    from vllm_atomic_moe.engine.refusals import check_config

    config = configure(model)
    check_config(config)
    change(config)
    with pytest.raises(ValueError, match=words):
        check_config(config)


def test_front_ends_without_profiles_are_refused(model, monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_atomic_moe.engine.refusals import check_config

    config = configure(model)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_USE_RUST_FRONTEND", "1")
        with pytest.raises(ValueError, match="the Rust front end"):
            check_config(config)
    name = "vllm.entrypoints.launchers.grpc_server"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ValueError, match="the gRPC front end"):
        InputProcessor(config)


def test_untested_features_are_named(model):
    from vllm_atomic_moe.engine.refusals import check_config, unverified

    config = configure(model)
    assert list(unverified(config.parallel_config)) == []
    config.parallel_config.distributed_executor_backend = "ray"
    check_config(config)
    assert list(unverified(config.parallel_config)) == [
        "the executor ray (--distributed-executor-backend)",
    ]


def test_cuda_graphs_need_a_kernel_that_can_be_captured(model, monkeypatch):
    from vllm.config import CUDAGraphMode

    from vllm_atomic_moe.engine import refusals
    from vllm_atomic_moe.experts.backends import Backend

    config = configure(model)
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    reference = Backend("reference", "not triton: no GPU")
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    refusals.check_graphs(config, reference)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    refusals.check_graphs(config, Backend("triton", "the fastest on cuda"))
    with pytest.raises(ValueError, match=r"CUDA graphs .*no GPU\); add --enforce-eager"):
        refusals.check_graphs(config, reference)


def test_additional_config_must_be_a_dict(model, no_weights_read):
    from vllm.model_executor.model_loader import get_model

    config = configure(model)
    config.additional_config = "text"
    with pytest.raises(ValueError, match=r"additional_config is str, .* needs a dict"):
        get_model(vllm_config=config)


def test_transformers_backend_is_refused_before_anything_is_built(model, tmp_path, no_weights_read):
    """By a flag, and by vLLM's own choice for an architecture without a model of its own."""
    words = r"the transformers backend \({}; vLLM has no model of its own .*; serve the model dense"
    with pytest.raises(ValueError, match=words.format("Qwen3MoeForCausalLM")):
        load(model, model_impl="transformers")
    config = transformers.FlexOlmoConfig(
        **COMMON, num_experts=8, num_experts_per_tok=2, intermediate_size=64
    )
    chosen = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(chosen)
    write_profile(describe_checkpoint(chosen), "narrow", chosen / "atomic_profiles", seed=1)
    with pytest.raises(ValueError, match=words.format("FlexOlmoForCausalLM")):
        load(chosen)


def test_a_models_own_experts_class_is_refused(model, monkeypatch, nothing_packed):
    from vllm.model_executor.models import qwen3_moe

    from vllm_atomic_moe.engine.compat import RoutedExperts

    class OwnExperts(RoutedExperts):
        pass

    original = qwen3_moe.FusedMoEFactory
    monkeypatch.setattr(
        qwen3_moe,
        "FusedMoEFactory",
        lambda **given: original(**given, routed_experts_cls=OwnExperts),
    )
    words = r"experts of a model's own class \(OwnExperts; model.layers.0.mlp.experts.*\); serve"
    with (
        pytest.raises(ValueError, match=words),
        engine(model, load_format="atomic-pruned", model_loader_extra_config={"active": "narrow"}),
    ):
        pass


def test_configuration_that_contradicts_the_checkpoint_is_refused(model, no_weights_read):
    with (
        pytest.raises(ValueError, match=r"builds experts E, I, H = \[8, 96, 128\]"),
        engine(
            model,
            load_format="atomic-pruned",
            model_loader_extra_config={"active": "narrow"},
            hf_overrides={"moe_intermediate_size": 96},
        ),
    ):
        pass


def test_weights_are_not_reloaded(model):
    with engine(
        model, load_format="atomic-pruned", model_loader_extra_config={"active": "narrow"}
    ) as llm:
        served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        before = prompt_logprobs(llm)
        tensors = load_file(model / "model.safetensors")
        with pytest.raises(ValueError, match=r"does not reload or update weights; restart"):
            served.load_weights(tensors.items())
        with pytest.raises(NotImplementedError, match="atomic-pruned"):
            llm.collective_rpc("reload_weights")
        assert torch.equal(prompt_logprobs(llm), before)


def test_profile_of_another_model_is_refused(model, tmp_path, no_weights_read):
    sibling = tmp_path / "sibling"
    make_checkpoint("qwen3_moe", sibling, seed=1)
    with pytest.raises(ValueError, match=r"profile 'narrow': made for router_sha256 .* sibling"):
        load(sibling, {"profiles": str(model / "atomic_profiles"), "active": "narrow"})


@pytest.mark.parametrize(
    ("layer_options", "words"),
    [
        ({"activation": "gelu"}, r"activations that the kernels do not know \(gelu; model"),
        ({"apply_router_weight_on_input": True}, r"router weights on the input of several expert"),
    ],
)
def test_unsupported_experts_are_refused(model, monkeypatch, nothing_packed, layer_options, words):
    """Properties that no small architecture here has, set when the model builds its experts."""
    from vllm.model_executor.models import qwen3_moe

    original = qwen3_moe.FusedMoEFactory
    monkeypatch.setattr(
        qwen3_moe, "FusedMoEFactory", lambda **given: original(**{**given, **layer_options})
    )
    with (
        pytest.raises(ValueError, match=words),
        engine(model, load_format="atomic-pruned", model_loader_extra_config={"active": "narrow"}),
    ):
        pass


def test_fused_shared_experts_and_sequence_parallel_ones_are_refused():
    """vLLM has them only on ROCm and with data parallelism, so this tests the rule alone."""
    from vllm_atomic_moe.engine.compat import MoEActivation
    from vllm_atomic_moe.engine.refusals import check_layer

    layer = SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        special="",
        moe_config=SimpleNamespace(
            has_bias=False,
            activation=MoEActivation.SILU,
            swiglu_limit=None,
            experts_per_token=2,
            moe_parallel_config=SimpleNamespace(is_sequence_parallel=False),
        ),
        apply_router_weight_on_input=False,
        expert_map_manager=SimpleNamespace(num_fused_shared_experts=0),
    )
    check_layer(layer, None)
    layer.expert_map_manager.num_fused_shared_experts = 1
    with pytest.raises(ValueError, match=r"shared experts fused into the routed ones \(model.l"):
        check_layer(layer, None)
    layer.moe_config.moe_parallel_config.is_sequence_parallel = True
    with pytest.raises(ValueError, match=r"sequence-parallel experts \(model.l"):
        check_layer(layer, None)


def test_quantized_experts_are_refused(model, nothing_packed):
    with (
        pytest.raises(ValueError, match=r"quantized experts of other kinds \(\w+; model.l"),
        engine(
            model,
            load_format="atomic-pruned",
            model_loader_extra_config={"active": "narrow"},
            quantization="fp8",
            dtype="bfloat16",
        ),
    ):
        pass


# --- the checkpoint -------------------------------------------------------------------------------


def with_changed_tensors(model, target, change):
    shutil.copytree(model, target)
    path = target / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return target


def test_missing_expert_tensor_is_named(model, tmp_path):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    broken = with_changed_tensors(
        model, tmp_path / "m", lambda t: {key: value for key, value in t.items() if key != name}
    )
    with pytest.raises(ValueError, match=r"layer 1 has 8 experts and 7 up projections; fetch"):
        logprobs_of(
            broken, load_format="atomic-pruned", model_loader_extra_config={"active": "narrow"}
        )


def test_expert_tensor_that_arrives_twice_is_named(model, tmp_path):
    def change(tensors):
        fused = torch.stack(
            [tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(8)]
        )
        return {**tensors, "model.layers.0.mlp.experts.down_proj": fused}

    broken = with_changed_tensors(model, tmp_path / "m", change)
    with pytest.raises(ValueError, match=r"one by one and all in one tensor"):
        logprobs_of(
            broken, load_format="atomic-pruned", model_loader_extra_config={"active": "narrow"}
        )


# --- residency ------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog, monkeypatch):
    import vllm.logger

    # An engine with another logging configuration would replace the handlers.
    monkeypatch.setattr(vllm.logger, "dictConfig", lambda config: None)
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", False)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_any_resident_profile_may_be_active_first(model, tmp_path):
    profile = PruningProfile.read(model / "atomic_profiles" / "other.safetensors")
    zero_pruned(model, tmp_path / "zeroed", profile)
    found = logprobs_of(
        model,
        load_format="atomic-pruned",
        model_loader_extra_config={"active": "other", "resident": ["narrow", "other", "dense"]},
    )
    assert (found - logprobs_of(tmp_path / "zeroed")).abs().max() < 1e-4


def test_resident_bytes_are_the_union_and_reported_once(model, log):
    masks = {
        name: PruningProfile.read(model / "atomic_profiles" / f"{name}.safetensors").keep
        for name in ("narrow", "other")
    }
    union = {i: masks["narrow"][i] | masks["other"][i] for i in range(3)}
    with engine(
        model,
        load_format="atomic-pruned",
        model_loader_extra_config={"active": "narrow", "resident": "all"},
    ) as llm:
        layers = packed_layers_of(llm)
        assert not any("w13_weight" in dict(layer.named_parameters()) for layer in layers)
        held = check_resident(layers, union)
    atom_bytes = 3 * 128 * 4
    (report,) = [r.message for r in log.records if r.message.startswith("Expert weights:")]
    assert f"({3 * 8 * 64 * atom_bytes} bytes) dense" in report
    assert f"({held} bytes) resident" in report
    profiles = [r.message for r in log.records if r.message.startswith("Profile ")]
    assert [line.split(":")[0] for line in profiles] == ["Profile narrow", "Profile other"]
    assert profiles[0].endswith("active")


def test_the_kernel_option_reaches_the_layers_and_the_log(model, log):
    extra = {"active": "narrow", "kernel": "reference"}
    with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
        assert {layer.backend.name for layer in packed_layers_of(llm)} == {"reference"}
    lines = [r.message for r in log.records if r.message.startswith("Expert kernel")]
    assert lines == ["Expert kernel: reference, as the options ask"]


def test_a_slower_kernel_is_announced(model, log, monkeypatch, tmp_path):
    from vllm_atomic_moe.experts.backends import cpu

    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("ATOMIC_MOE_CACHE", str(tmp_path / "empty"))
    cpu._load.cache_clear()
    extra = {"active": "narrow"}
    try:
        with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
            assert {layer.backend.name for layer in packed_layers_of(llm)} == {"reference"}
    finally:
        cpu._load.cache_clear()
    (line,) = [r for r in log.records if r.message.startswith("Expert kernel: ")]
    assert line.levelname == "WARNING"
    assert line.message.startswith("Expert kernel: reference, not cpu: ")


def test_another_load_device_is_refused(model, no_weights_read):
    config = configure(model)
    config.load_config.device = "cuda"
    from vllm.model_executor.model_loader import get_model

    with pytest.raises(ValueError, match=r"load config's device is cuda, the model runs on cpu"):
        get_model(vllm_config=config)


def test_invalid_file_that_is_not_requested_warns(model, tmp_path, log):
    profiles = tmp_path / "profiles"
    shutil.copytree(model / "atomic_profiles", profiles)
    (profiles / "broken.safetensors").write_bytes(b"no profile")
    PruningProfile("misfit", {0: torch.ones(8, 64).bool()}).write(profiles / "misfit.safetensors")
    with engine(
        model,
        load_format="atomic-pruned",
        model_loader_extra_config={
            "profiles": str(profiles),
            "active": "narrow",
            "resident": "all",
        },
    ):
        pass
    warnings = [r.message for r in log.records if r.message.startswith("left out:")]
    assert len(warnings) == 2
    assert any("broken.safetensors" in line for line in warnings)
    assert any("profile 'misfit'" in line for line in warnings)


def test_only_profile_is_the_default_and_origin_unknown_warns(model, tmp_path, log):
    info_masks = PruningProfile.read(model / "atomic_profiles" / "narrow.safetensors").keep
    PruningProfile("lonely", info_masks).write(tmp_path / "lonely.safetensors")
    with engine(
        model,
        load_format="atomic-pruned",
        model_loader_extra_config={"profiles": str(tmp_path)},
    ):
        pass
    assert any("'lonely' does not say which model" in r.message for r in log.records)


@pytest.mark.parametrize("inner_format", ["auto", pytest.param("hf", marks=pytest.mark.full)])
def test_other_inner_formats_give_the_same(model, inner_format):
    extra = {"active": "narrow"}
    plain = logprobs_of(model, load_format="atomic-pruned", model_loader_extra_config=extra)
    extra["inner_format"] = inner_format
    other = logprobs_of(model, load_format="atomic-pruned", model_loader_extra_config=extra)
    assert torch.equal(plain, other)


def test_options_go_on_to_vllms_loader():
    options = LoaderOptions.parse({"active": "a", "enable_multithread_load": True})
    assert dict(options.inner) == {"enable_multithread_load": True}
    assert options.inner_format == "safetensors"


def test_multithreaded_reading_gives_the_same(model):
    extra = {"active": "narrow"}
    plain = logprobs_of(model, load_format="atomic-pruned", model_loader_extra_config=extra)
    threaded = logprobs_of(
        model,
        load_format="atomic-pruned",
        model_loader_extra_config={**extra, "enable_multithread_load": True, "num_threads": 3},
    )
    assert torch.equal(plain, threaded)


def test_other_load_formats_are_unaffected(model):
    from vllm.model_executor.custom_op import op_registry_oot

    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

    with engine(model) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        modules = list(worker.model_runner.model.modules())
        assert not [module for module in modules if isinstance(module, AtomicRoutedExperts)]
        assert "atomic_moe" not in llm.llm_engine.vllm_config.additional_config
        assert torch.isfinite(prompt_logprobs(llm)).all()
        assert "execute_model" not in vars(worker.model_runner)
        assert not hasattr(llm.llm_engine.input_processor, "atomic_moe_admission")
        (rank,) = llm.collective_rpc("atomic_moe_rank", args=("describe", {}))
        for reply in (rank, core(llm, "status")):
            assert not reply["ok"]
            assert "was not loaded with --load-format atomic-pruned" in reply["error"]
    assert "RoutedExperts" not in op_registry_oot


def test_digest_depends_on_what_is_resident(model):
    from vllm_atomic_moe.engine.options import select_profiles
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint

    info, directory = describe_checkpoint(model), model / "atomic_profiles"
    digests = {
        json.dumps(extra): select_profiles(LoaderOptions.parse(extra), directory, info).digest()
        for extra in (
            {"active": "narrow"},
            {"active": "other"},
            {"active": "other", "resident": ["narrow"]},
        )
    }
    assert len(set(digests.values())) == 3


def test_profiles_of_a_hub_repository(model, tmp_path, caplog):
    """From `--download-dir`, like the checkpoint; the rank keeps the snapshot's path."""
    from vllm_atomic_moe.engine.worker import ATTRIBUTE

    file = model / "atomic_profiles/narrow.safetensors"
    snapshot = lay_out(tmp_path, "org/profiles", "v1", {"folder/narrow.safetensors": file})
    extra = {"profiles": "org/profiles@v1/folder"}
    options = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with engine(model, **options, download_dir=str(tmp_path)) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        profiles = getattr(worker.model_runner.model, ATTRIBUTE)
        assert profiles._directory == snapshot / "folder"
    with pytest.raises(
        ValueError, match="'org/profiles' is neither a directory nor on the Hugging"
    ):
        load(model, {"profiles": "org/profiles@v2/folder"}, download_dir=str(tmp_path))


# --- several ranks --------------------------------------------------------------------------------


class World:
    """One of two ranks."""

    world_size, cpu_group = 2, None

    def __init__(self, rank):
        self.is_first_rank = rank == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_reports_for_all(model, monkeypatch, log, rank):
    from vllm_atomic_moe.engine import loader, options
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint

    parsed = LoaderOptions.parse({"active": "narrow"})
    directory = model / "atomic_profiles"
    resident = options.select_profiles(parsed, directory, describe_checkpoint(model))
    log.clear()
    monkeypatch.setattr(loader, "get_world_group", lambda: World(rank))
    loader._report(resident, 6144, [3072, 1024])
    lines = [record.message for record in log.records]
    if rank > 0:
        assert not lines
        return
    assert "(6144 bytes) dense, 0.00 MiB (4096 bytes) resident (66.7 %)" in lines[0]
    assert lines[1] == "Resident on each rank: 0.00 MiB (3072 bytes), 0.00 MiB (1024 bytes)"
    assert lines[2].startswith("Profile narrow:")


def test_ranks_that_read_different_profiles_are_refused(monkeypatch):
    from vllm_atomic_moe.engine import loader

    def gather(ranks, own, group):
        ranks[:] = [own, ("theirs", 5)]

    monkeypatch.setattr(loader, "get_world_group", lambda: World(0))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert loader._bytes_of_ranks("theirs", 3) == [3, 5]
    with pytest.raises(ValueError, match="the ranks read different profiles; give all of them"):
        loader._bytes_of_ranks("ours", 3)


@pytest.mark.parametrize(("size", "wanted"), [(1, [[0, 2, 3]]), (2, [[0], [2, 3]])])
def test_every_layer_belongs_to_a_pipeline_rank(model, size, wanted):
    """vLLM counts three layers; a fourth that the checkpoint holds is not overlooked."""
    from vllm_atomic_moe.engine.loader import _layers_of_rank

    config = configure(model, pipeline_parallel_size=size)
    for rank, layers in enumerate(wanted):
        config.parallel_config.rank = rank
        assert _layers_of_rank(config, config.model_config, (0, 2, 3)) == layers
