"""vLLM 0.33's adapter against what was read out of its wheel (`vllm_symbols`). No engine of it runs here.

The installed vLLM is another one. What 0.33 has beside it is stood in for.
"""

import enum
import inspect
import json
import os
import sys
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vllm_symbols

from turboquant_kernels.formats import COMPRESSED_FORMATS, KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.configuration import RefusedConfiguration

RECORD = json.loads(Path(__file__).with_name("vllm_0_33.json").read_text())
PLAN = KVPlan((KVFormat(4, 4), KVFormat(8, 4)))


def recorded(symbol: str) -> list[str]:
    """Arguments or fields of a symbol, named without its path, as 0.33 has them."""
    (found,) = (value for name, value in RECORD.items() if name.endswith(" " + symbol) and value is not None)
    return found


def accepts(function, arguments: list[str]) -> bool:
    """Whether a call with these arguments can be made, by position and by name."""
    names = [name for name in arguments if name not in ("self", "cls")]
    signature = inspect.signature(function)
    own = [name for name in signature.parameters if name != "self"]
    values = dict.fromkeys(names)
    bound = [None] if "self" in signature.parameters else []
    signature.bind(*bound, *values.values())
    signature.bind(*bound, **values)
    return [name for name in own if name in names] == [name for name in names if name in own]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vllm.v1.kv_cache_interface.KVQuantMode.CUSTOM", 12, raising=False)
    from turboquant_runtime.adapters import vllm_0_33

    return vllm_0_33


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch):
    layouts = ModuleType("vllm.v1.kv_cache_layout")
    layouts.KVCacheLayout = enum.Enum("KVCacheLayout", recorded("KVCacheLayout"))
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_cache_layout", layouts)
    from turboquant_runtime.adapters import vllm_0_33_backends

    return vllm_0_33_backends


@dataclass(frozen=True)
class Spec:
    """The fields of 0.33's `AttentionSpec` that are read or set."""

    head_size: int = 128
    dtype: torch.dtype = torch.uint8
    state_content_bytes: int | None = None
    kv_quant_mode: object = None
    block_size: int = 16

    @property
    def page_size_bytes(self) -> int:
        bytes_of_a_slot = self.state_content_bytes or 2 * self.head_size * self.dtype.itemsize
        return 2 * self.block_size * bytes_of_a_slot


def engine_config(hybrid: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=None,
        additional_config={"turboquant": PLAN.to_dict()},
        cache_config=SimpleNamespace(cache_dtype="tq-k4v4", num_gpu_blocks_override=None),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: 2, dtype=torch.bfloat16, is_hybrid=hybrid
        ),
    )


@pytest.mark.skipif("VLLM_0_33_WHEEL" not in os.environ, reason="VLLM_0_33_WHEEL names no wheel")
def test_the_record_is_what_the_wheel_says() -> None:
    assert vllm_symbols.read(Path(os.environ["VLLM_0_33_WHEEL"])) == RECORD


def test_every_symbol_has_been_recorded() -> None:
    assert list(RECORD) == list(vllm_symbols.SYMBOLS)


def test_what_is_replaced_in_a_module_is_found_by_name_there() -> None:
    for name in ("EngineCoreReadyResponse", "get_kv_cache_configs", "init_none_hash"):
        assert f"v1/engine/core.py {name}" in RECORD


@pytest.mark.parametrize("platform", ["CpuPlatform", "CudaPlatformBase"])
def test_the_platforms_patched_methods_have_the_known_arguments(platform: str) -> None:
    chosen = ["cls", "selected_backend", "attn_selector_config", "num_heads"]
    assert recorded(f"{platform}.get_attn_backend_cls") == chosen
    assert recorded(f"{platform}.check_and_update_config") == ["cls", "vllm_config"]


def test_the_functions_called_take_what_they_are_given() -> None:
    assert recorded("get_kv_cache_groups") == ["vllm_config", "kv_cache_spec"]
    assert recorded("get_kv_cache_config_from_groups") == [
        *("vllm_config", "kv_cache_groups", "available_memory"),
    ]
    assert recorded("get_kv_cache_capacity") == ["vllm_config", "kv_cache_config"]
    assert recorded("extract_layer_index")[0] == "layer_name"
    assert recorded("Attention.get_kv_cache_spec") == ["self", "vllm_config"]
    assert recorded("get_kv_cache_configs")[:3] == ["vllm_config", "kv_cache_specs", "available_memory"]
    assert recorded("MPClient._apply_ready_response") == ["self", "payload"]
    assert recorded("register_kv_cache_dtype") == ["name"]


def test_a_backend_answers_with_the_selectors_fields() -> None:
    asked = set(recorded("AttentionBackend.validate_configuration"))
    assert set(recorded("AttentionSelectorConfig")) | {"cls", "device_capability"} == asked


@pytest.mark.parametrize("name", ["CompressedCPUBackend", "CompressedCUDABackend"])
def test_a_backend_can_be_called_as_0_33_does(backends, name: str) -> None:
    backend = getattr(backends, name)
    impl, builder = backend.get_impl_cls(), backend.get_builder_cls()
    for method in ("get_supported_kernel_block_sizes", "customize_spec", "supported_kv_cache_layouts"):
        assert accepts(getattr(backend, method), recorded(f"AttentionBackend.{method}"))
    assert backend.supports_sliding_window()
    assert accepts(impl.__init__, recorded("AttentionImpl.__init__"))
    assert accepts(impl.forward, recorded("AttentionImpl.forward"))
    assert accepts(builder.__init__, recorded("AttentionMetadataBuilder.__init__"))
    assert accepts(builder.build, recorded("AttentionMetadataBuilder.build"))
    assert [layout.name for layout in backend.supported_kv_cache_layouts()] == ["LBNHC"]


def test_a_batch_has_the_fields_that_a_step_is_made_of() -> None:
    fields = {"query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "causal"}
    assert fields | {"block_table_tensor", "num_actual_tokens"} <= set(recorded("CommonAttentionMetadata"))


def test_a_spec_has_a_field_for_bytes() -> None:
    assert set(Spec.__dataclass_fields__) - {"block_size"} <= set(recorded("AttentionSpec"))


def test_every_format_is_registered_with_pages_of_bytes(adapter, monkeypatch) -> None:
    handlers = {}

    def register(name: str):
        return lambda cls: handlers.setdefault(name, cls())

    monkeypatch.setattr("vllm.config.cache.register_kv_cache_dtype", register, raising=False)
    adapter.register_cache_dtypes()
    assert list(handlers) == [fmt.name for fmt in COMPRESSED_FORMATS]
    for name, handler in handlers.items():
        assert (handler.name, handler.torch_dtype(), handler.quant_mode()) == (name, torch.uint8, 12)


def test_a_layers_spec_has_the_bytes_of_its_own_format(adapter, monkeypatch) -> None:
    from vllm.model_executor.layers.attention.attention import Attention

    monkeypatch.setattr(
        Attention, "get_kv_cache_spec", lambda layer, vllm_config: Spec(head_size=layer.head_size)
    )
    monkeypatch.setattr("vllm.config.set_current_vllm_config", lambda vllm_config: nullcontext())
    adapter._give_layers_their_own_size.__wrapped__()
    layer = namedtuple("Layer", "layer_name kv_cache_dtype head_size head_size_v")

    def spec(index: int, dtype: str = "tq-k4v4", head_size_v: int = 128) -> Spec:
        made = layer(f"model.layers.{index}.self_attn.attn", dtype, 128, head_size_v)
        return Attention.get_kv_cache_spec(made, engine_config())

    assert [spec(index).page_size_bytes for index in range(2)] == [
        2 * layer.page_bytes(128, 16) for layer in PLAN.layers
    ]
    assert spec(0, "auto").state_content_bytes is None
    with pytest.raises(RefusedConfiguration, match="another head size"):
        spec(0, head_size_v=64)


def test_a_spec_without_a_layer_gets_the_largest_slot_of_the_plan(backends, monkeypatch) -> None:
    monkeypatch.setattr(backends, "get_current_vllm_config", engine_config)
    customize = backends.CompressedCPUBackend.customize_spec
    assert customize(Spec()).state_content_bytes == KVFormat(8, 4).slot_bytes(128)
    sized = Spec(state_content_bytes=132)
    assert customize(sized) is sized
    plain = Spec(dtype=torch.bfloat16)
    assert customize(plain) is plain


def test_a_layer_sees_pages_with_tokens_before_heads(backends) -> None:
    class Base:
        def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
            self.written = kv_cache

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
            return kv_cache

    class Impl(backends._Impl, Base):
        pass

    pages = torch.arange(3 * 16 * 2 * 4).reshape(3, 16, 2, 4)
    handed_over, impl = pages.transpose(1, 2), Impl()
    impl.do_kv_cache_update(None, None, None, handed_over, None)
    read = impl.forward(None, None, None, None, handed_over, None, output=None)
    for seen in (impl.written, read):
        assert torch.equal(seen, pages)
        assert seen.is_contiguous()
    assert impl.forward(None, None, None, None, torch.tensor([]), None, output=None).numel() == 0


def test_the_uncompressed_capacity_is_laid_out_by_vllms_own_functions(adapter, monkeypatch) -> None:
    """Here by one that counts whole blocks: memory for five in bf16, whatever the formats take."""
    from vllm.v1 import core
    from vllm.v1.core import kv_cache_utils

    planning = ModuleType("vllm.v1.core.kv_cache_planning")
    planning.get_kv_cache_groups = lambda config, specs: list(specs.values())
    planning.get_kv_cache_config_from_groups = lambda config, groups, memory: (
        memory // sum(spec.page_size_bytes for spec in groups)
    )
    monkeypatch.setitem(sys.modules, planning.__name__, planning)
    monkeypatch.setattr(core, "kv_cache_planning", planning, raising=False)
    monkeypatch.setattr(kv_cache_utils, "get_kv_cache_capacity", lambda config, blocks: (16 * blocks, 0))
    specs = {
        f"model.layers.{index}": Spec(state_content_bytes=fmt.slot_bytes(128))
        for index, fmt in enumerate(PLAN.layers)
    }
    plain_page = 2 * 16 * 512
    capacity = adapter.measure_capacity(engine_config(), [specs], [5 * 2 * plain_page])
    assert capacity.baseline_tokens == 5 * 16
    assert capacity.bytes_per_token == sum(2 * fmt.slot_bytes(128) for fmt in PLAN.layers)


def test_a_hybrid_is_refused_with_a_way_out(adapter) -> None:
    with pytest.raises(RefusedConfiguration, match=r"vLLM 0\.25\.1 only so far: use that version"):
        adapter.accept(engine_config(hybrid=True))
