"""What pages take: each layer's own bytes, and pages of one size beside layers in the model's own dtype.

On layers and configurations that hold what vLLM's functions read of them; engines do the same in
`test_engine_capacity`.
"""

from types import SimpleNamespace

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import COMPRESSED_FORMATS, HEAD_DIMS, KVFormat
from turboquant_kernels.plans import KVPlan
from turboquant_runtime import plugin
from turboquant_runtime.configuration import RefusedConfiguration

KV_HEADS = 2


@pytest.fixture(scope="module")
def specs():
    plugin.register()
    from turboquant_runtime.adapters import specs

    return specs


@pytest.fixture(params=["cpu", "cuda"])
def plain_backend(request):
    """vLLM's own backend of a device: blocks of 32 tokens and more, or of 16."""
    if request.param == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm.v1.attention.backend import AttentionBackend, MultipleOf

    class Flash(AttentionBackend):
        get_supported_kernel_block_sizes = staticmethod(lambda kv_cache_spec=None: [MultipleOf(16)])

    return Flash


def layer(
    fmt_name: str, backend: type, head_dim: int = 128, window: int | None = None, kind: type | None = None
):
    """An attention layer as far as its cache spec goes; the format `auto` is the model's own dtype."""
    from vllm.model_executor.layers.attention import Attention

    layer = (kind or Attention).__new__(kind or Attention)
    facts = {
        "kv_cache_dtype": fmt_name,
        "kv_cache_torch_dtype": torch.uint8 if fmt_name != "auto" else torch.bfloat16,
        "num_kv_heads": KV_HEADS,
        "head_size": head_dim,
        "head_size_v": head_dim,
        "sliding_window": window,
        "attn_type": "decoder",
        "attn_backend": backend,
        "kv_sharing_target_layer_name": None,
    }
    layer.__dict__.update(facts)
    return layer


def engine_config(
    cache_dtype: str, layers: dict, *, plan: KVPlan | None = None, block_size: int = 128, hybrid: bool = False
) -> SimpleNamespace:
    return SimpleNamespace(
        speculative_config=None,
        additional_config={"turboquant": plan.to_dict()} if plan else {},
        cache_config=SimpleNamespace(
            block_size=block_size,
            cache_dtype=cache_dtype,
            skip_page_size_padded=None,
            mamba_page_size_padded=None,
            mamba_cache_mode="none",
            enable_prefix_caching=not hybrid,
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        model_config=SimpleNamespace(
            get_total_num_hidden_layers=lambda: len(layers),
            get_head_size=lambda: 128,
            dtype=torch.bfloat16,
            is_hybrid=hybrid,
            hf_text_config=None,
        ),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def compressed_backend():
    from turboquant_runtime.backends.cpu import CompressedCPUBackend

    return CompressedCPUBackend


def named(*layers) -> dict:
    return {f"model.layers.{index}.self_attn.attn": one for index, one in enumerate(layers)}


def specs_of(specs, config) -> list:
    specs.put_formats_on_layers(config)
    specs.fit_plain_layers(config)
    return list(dict(specs._specs(config, specs._layers(config))).values())


@pytest.mark.parametrize("fmt", COMPRESSED_FORMATS, ids=lambda fmt: fmt.name)
def test_a_page_has_the_bytes_of_its_format(specs, fmt: KVFormat) -> None:
    for head_dim in HEAD_DIMS:
        for window in (None, 512):
            layers = named(layer(fmt.name, compressed_backend(), head_dim, window))
            (spec,) = specs_of(specs, engine_config(fmt.name, layers))
            assert spec.page_size_bytes == KV_HEADS * fmt.page_bytes(head_dim, spec.block_size)
            assert spec.head_size == head_dim


def test_a_plan_gives_each_layer_its_own_page(specs) -> None:
    plan = KVPlan((KVFormat(4, 4), KVFormat(8, 4)))
    layers = named(*(layer("tq-k4v4", compressed_backend()) for _ in plan.layers))
    found = specs_of(specs, engine_config("tq-k4v4", layers, plan=plan))
    assert [spec.page_size_bytes for spec in found] == [
        KV_HEADS * f.page_bytes(128, 128) for f in plan.layers
    ]
    assert len({one.attn_backend.full_cls_name() for one in layers.values()}) == 1


def test_plain_layers_enlarge_no_blocks_where_all_layers_have_full_attention(specs, plain_backend) -> None:
    layers = named(layer("auto", plain_backend), *(layer("tq-k4v4", compressed_backend()) for _ in range(3)))
    config = engine_config("tq-k4v4", layers)
    plain, *others = specs_of(specs, config)
    assert config.cache_config.block_size == 128
    assert plain.page_size_bytes == KV_HEADS * 512 * 128
    assert {spec.page_size_bytes for spec in others} == {KV_HEADS * 132 * 128}


@pytest.mark.parametrize("fmt", ["tq-k8v4", "tq-k4v4", "tq-k3v2", "tq-k2v2", "tq-k8v8"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("plain_window", [None, 512])
def test_pages_beside_sliding_windows_are_of_one_size_and_nearly_full(
    specs, plain_backend, fmt: str, head_dim: int, plain_window: int | None
) -> None:
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size

    layers = named(
        layer("auto", plain_backend, head_dim, plain_window),
        layer(fmt, compressed_backend(), head_dim, 512),
        layer(fmt, compressed_backend(), head_dim),
    )
    config = engine_config(fmt, layers)
    # vLLM makes blocks of windows as small as the backend's and then enlarges them.
    found = list(unify_kv_cache_spec_page_size(dict(enumerate(specs_of(specs, config)))).values())
    assert len({spec.page_size_bytes for spec in found}) == 1
    plain, *others = found
    assert {spec.block_size for spec in others} == {config.cache_config.block_size}
    assert config.cache_config.block_size % plain.block_size == 0
    assert all(spec.page_size_bytes == spec.unpadded_page_size_bytes for spec in others)
    assert plain.unpadded_page_size_bytes / plain.page_size_bytes > 0.7


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("state_bytes", [41_000, 800_000])
@pytest.mark.parametrize("fmt", ["tq-k8v8", "tq-k8v4", "tq-k4v4", "tq-k3v2"])
def test_plain_layers_of_a_hybrid_fit_the_pages_that_hold_a_state(
    specs, plain_backend, fmt: str, state_bytes: int, prefix_caching: bool, monkeypatch
) -> None:
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.kv_cache_interface import MambaSpec

    class State:
        def get_kv_cache_spec(self, config):
            return MambaSpec(
                shapes=((state_bytes,),),
                dtypes=(torch.uint8,),
                block_size=4096,
                page_size_padded=config.cache_config.mamba_page_size_padded,
                mamba_type=MambaAttentionBackendEnum.MAMBA2,
            )

    # As vLLM has aligned them: blocks as large as a state, and a state padded to them.
    token_bytes = KV_HEADS * KVFormat.parse(fmt).slot_bytes(128)
    aligned = -(-state_bytes // token_bytes // 128) * 128
    layers = named(layer("auto", plain_backend), layer(fmt, compressed_backend()), State())
    config = engine_config(fmt, layers, block_size=aligned, hybrid=True)
    config.model_config.hf_text_config = SimpleNamespace(
        layers_block_type=["attention", "attention", "mamba"]
    )
    config.cache_config.mamba_page_size_padded = aligned * token_bytes
    config.cache_config.enable_prefix_caching = prefix_caching
    monkeypatch.setattr(specs, "_layers", lambda _: layers)
    plain, compressed, state = specs_of(specs, config)
    page = config.cache_config.block_size * token_bytes
    assert {spec.page_size_bytes for spec in (plain, compressed, state)} == {page}
    if prefix_caching:
        assert compressed.block_size % plain.block_size == 0
    assert compressed.block_size <= max(aligned, 384) * 2
    assert plain.unpadded_page_size_bytes / page > (0.74 if state_bytes > 100_000 or prefix_caching else 0.5)


def test_attention_of_another_kind_is_refused(specs) -> None:
    from vllm.model_executor.layers.attention import Attention

    class RSWAAttention(Attention):
        pass

    layers = named(layer("tq-k4v4", compressed_backend(), kind=RSWAAttention))
    with pytest.raises(RefusedConfiguration, match=r"layers\.0.*RSWAAttention cannot be compressed"):
        specs.put_formats_on_layers(engine_config("tq-k4v4", layers))


def test_values_of_another_head_size_are_refused(specs) -> None:
    layers = named(layer("tq-k4v4", compressed_backend()))
    layers["model.layers.0.self_attn.attn"].__dict__["head_size_v"] = 64
    with pytest.raises(RefusedConfiguration, match="another head size"):
        specs.put_formats_on_layers(engine_config("tq-k4v4", layers))


def test_a_backend_that_another_kind_of_attention_made_is_refused_as_its_layer_is_made() -> None:
    from vllm.v1.attention.backend import subclass_attention_backend

    backend = compressed_backend()
    assert backend.get_impl_cls() is not None
    assert backend.of_format(KVFormat(4, 4)).get_impl_cls() is backend.get_impl_cls()
    derived = subclass_attention_backend("StaticSink_", backend, backend.get_builder_cls())
    with pytest.raises(RefusedConfiguration, match="StaticSink_CompressedCPUBackend"):
        derived.get_impl_cls()


@pytest.mark.parametrize(
    ("layer_name", "name"),
    [
        ("model.layers.1.self_attn.attn", "tq-k8v4"),
        ("model.layers.2.self_attn.attn", "tq-k5v3"),
        ("draft_model.model.layers.1.self_attn.attn", "tq-k5v3"),
    ],
)
def test_a_draft_model_takes_the_named_format(layer_name: str, name: str) -> None:
    """Its layers follow the target's in number, or have a prefix; the plan is the target's."""
    from turboquant_runtime.adapters.engine_config import layer_format

    plan = KVPlan((KVFormat(4, 4), KVFormat(8, 4)))
    config = engine_config("tq-k5v3", dict.fromkeys(range(2)), plan=plan)
    assert layer_format(config, layer_name).name == name


def test_the_plan_is_that_of_the_target_model() -> None:
    """A draft model is made under a configuration of its own, whose model has other layers."""
    from turboquant_runtime.adapters.engine_config import plan_of

    config = engine_config("tq-k4v4", {})
    target = SimpleNamespace(get_total_num_hidden_layers=lambda: 24, is_hybrid=False)
    config.speculative_config = SimpleNamespace(target_model_config=target)
    assert len(plan_of(config).layers) == 24


def test_the_plan_of_a_hybrid_lists_its_attention_layers_alone() -> None:
    from turboquant_runtime.adapters.engine_config import layer_format, plain_layer_indices, plan_of

    plan = KVPlan((KVFormat(8, 4), KVFormat.parse("bf16")))
    config = engine_config("tq-k4v4", dict.fromkeys(range(4)), plan=plan, hybrid=True)
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    config.model_config.hf_text_config = SimpleNamespace(layer_types=types)
    assert layer_format(config, "model.layers.1.self_attn.attn") == KVFormat(8, 4)
    assert plain_layer_indices(config, plan_of(config)) == [3]


def test_the_baseline_undoes_every_format(specs, plain_backend) -> None:
    from turboquant_runtime.adapters import baseline

    for fmt in COMPRESSED_FORMATS:
        layers = named(layer("auto", plain_backend), layer(fmt.name, compressed_backend(), window=512))
        config = engine_config(fmt.name, layers)
        config.model_config.dtype = torch.bfloat16
        config.cache_config.user_specified_block_size = True
        found = dict(enumerate(specs_of(specs, config)))
        for spec in baseline.uncompressed_specs(found, config).values():
            assert spec.page_size_bytes == KV_HEADS * 512 * config.cache_config.block_size


def test_only_layers_with_our_formats_are_routed_to_our_backend() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    def backend(kv_cache_dtype: str) -> str:
        config = AttentionSelectorConfig(128, torch.bfloat16, kv_cache_dtype, 128)
        return current_platform.get_attn_backend_cls(None, attn_selector_config=config)

    assert backend("tq-k4v4") == current_platform.compressed_backend
    assert backend("auto") == AttentionBackendEnum.CPU_ATTN.get_path()


@pytest.mark.parametrize("fact", ["use_rswa", "use_non_causal", "use_dcp", "use_adaptive_verification"])
def test_a_layer_that_is_not_for_our_backend_is_refused(fact: str) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(128, torch.bfloat16, "tq-k4v4", 128, **{fact: True})
    with pytest.raises(RefusedConfiguration, match="start with --kv-cache-dtype auto"):
        current_platform.get_attn_backend_cls(None, attn_selector_config=config)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_a_block_is_one_piece_of_bytes_in_either_layout(layout: str) -> None:
    """Padded pages too: layers with fewer bits beside larger ones."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, create_kv_cache_views
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from turboquant_runtime.backends.base import CompressedBackend, blocks_of

    codec = Codec(KVFormat(4, 4), 64)
    assert KVCacheLayout[layout] in CompressedBackend.supported_kv_cache_layouts()
    spec = FullAttentionSpec(
        block_size=32,
        num_kv_heads=3,
        head_size=64,
        dtype=torch.uint8,
        state_content_bytes=68,
        page_size_padded=7000,
    )
    raw = torch.arange(5 * 7000).to(torch.int8)
    tensor = KVCacheTensor(size=len(raw), layers=["one"], layer_stride=len(raw), block_stride=7000)
    (view,) = create_kv_cache_views(raw, spec, 5, KVCacheLayout[layout], tensor)
    blocks = blocks_of(view, codec)
    assert blocks.shape == (5, 32, 3, 68)
    for index in range(5):
        assert (blocks[index].flatten() == raw[7000 * index :][: 32 * 3 * 68].view(torch.uint8)).all()


@pytest.mark.parametrize("window", [None, 512])
def test_a_layer_without_a_format_yet_has_a_spec(specs, window) -> None:
    """vLLM asks for it while it loads a draft model."""
    one = layer("tq-k4v4", compressed_backend(), window=window)
    assert one.get_kv_cache_spec(engine_config("tq-k4v4", named(one))).block_size == 128


def test_sequences_have_blocks_for_the_smallest_pages(specs) -> None:
    plan = KVPlan((KVFormat(8, 4), KVFormat(3, 3), KVFormat.parse("bf16")))
    plain = plain_layer_backend()
    layers = named(
        layer("tq-k8v4", compressed_backend()), layer("tq-k8v4", compressed_backend()), layer("auto", plain)
    )
    config = engine_config("tq-k8v4", layers, plan=plan)
    specs.put_formats_on_layers(config)
    specs.give_sequences_raw_blocks(config)
    found = dict(specs._specs(config, layers)).values()
    assert {spec.raw_tokens for spec in found} == {6 * 128}  # of k3v3, also where a layer has none of its own


def test_heads_larger_than_the_configurations_are_refused(specs) -> None:
    layers = named(layer("tq-k3v3", compressed_backend(), head_dim=256))
    config = engine_config("tq-k3v3", layers)
    config.model_config.get_head_size = lambda: 64
    specs.put_formats_on_layers(config)
    with pytest.raises(RefusedConfiguration, match=r"layers\.0.* heads of 256 elements are not those"):
        specs.give_sequences_raw_blocks(config)


def plain_layer_backend():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
