"""The blocks that a sequence has for its raw block: in vLLM's plans of memory and in its managers."""

from types import SimpleNamespace

import pytest
import torch

from turboquant_runtime import plugin

BLOCK, RAW_TOKENS, MAX_LEN = 128, 4 * 128, 1000


@pytest.fixture(scope="module")
def module():
    plugin.register()
    from turboquant_runtime.adapters import raw_block_specs

    return raw_block_specs


@pytest.fixture
def config() -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_LEN),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=200,
    )


def plain(window: int | None = None, block_size: int = BLOCK, **fields):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    kind = SlidingWindowSpec if window else FullAttentionSpec
    fields |= {"sliding_window": window} if window else {}
    return kind(block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.uint8, **fields)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("block_size", "extra"), [(128, 4), (256, 2), (384, 2), (1024, 1)])
def test_memory_and_tables_count_them(module, config, window, block_size: int, extra: int) -> None:
    before = plain(window, block_size)
    spec = module.with_extra_blocks(before, RAW_TOKENS)
    assert isinstance(spec, type(before))
    more = spec.max_memory_usage_bytes(config) - before.max_memory_usage_bytes(config)
    assert more == extra * spec.page_size_bytes
    widths = [one.max_num_blocks_per_req(config, MAX_LEN) for one in (before, spec)]
    assert widths[1] - widths[0] == extra
    assert module.without_extra_blocks(spec) == before


def test_blocks_that_vllm_enlarges_are_fewer(module, config) -> None:
    spec = module.with_extra_blocks(plain(300), RAW_TOKENS).copy_with_new_block_size(256)
    assert module.extra_blocks(spec) == 2


def test_merged_layers_keep_them(module) -> None:
    specs = [module.with_extra_blocks(plain(state_content_bytes=68), RAW_TOKENS) for _ in range(3)]
    assert specs[0].merge(specs) == specs[0]
    with pytest.raises(AssertionError):
        specs[0].merge([specs[0], plain(state_content_bytes=68)])


def test_layers_of_other_sizes_are_of_one_type(module) -> None:
    """Plain ones among them: only so does vLLM give all one block table."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    specs = {
        str(size): module.with_extra_blocks(plain(state_content_bytes=size), RAW_TOKENS) for size in (68, 52)
    }
    specs["plain"] = module.with_extra_blocks(plain(), RAW_TOKENS)
    assert UniformTypeKVCacheSpecs.is_uniform_type(specs)


def test_a_window_may_keep_all_its_blocks(module) -> None:
    spec = module.with_extra_blocks(module.as_full_attention(plain(300)), RAW_TOKENS)
    assert type(spec) is module.RawBlockSpec
    assert spec.sliding_window == 300
    assert module.as_full_attention(plain()) == plain()


def manager_of(spec, blocks: int):
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.single_type_kv_cache_manager import get_manager_for_kv_cache_spec

    pool = BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK)
    return pool, get_manager_for_kv_cache_spec(
        spec,
        max_in_flight_tokens=200,
        max_model_len=MAX_LEN,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
    )


@pytest.mark.parametrize("window", [None, 300])
def test_a_sequence_always_has_them_behind_its_tokens(module, window) -> None:
    pool, manager = manager_of(module.with_extra_blocks(plain(window), RAW_TOKENS), 40)
    for tokens in (1, 127, 128, 129, 500, MAX_LEN):
        needed = manager.get_num_blocks_to_allocate("a", tokens, [], 0, 0, tokens)
        before = len(manager.req_to_blocks["a"])
        manager.allocate_new_blocks("a", tokens, tokens)
        own = -(-tokens // BLOCK)
        assert len(manager.req_to_blocks["a"]) == own + 4 == before + needed
        manager.num_cached_block.setdefault("a", 0)  # as the scheduler's first step leaves it
    manager.free("a")
    assert pool.get_num_free_blocks() == 39


def test_a_window_is_admitted_with_no_more_than_it_holds(module, config) -> None:
    spec = module.with_extra_blocks(plain(300), RAW_TOKENS)
    _, manager = manager_of(spec, 40)
    admitted = manager.get_num_blocks_to_allocate("a", MAX_LEN, [], 0, 0, MAX_LEN, apply_admission_cap=True)
    assert admitted == spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    assert admitted == -(-(299 + 200) // BLOCK) + 1 + 4


def test_no_hit_ends_inside_a_block(module) -> None:
    for window in (None, 300):
        _, manager = manager_of(module.with_extra_blocks(plain(window), RAW_TOKENS), 40)
        assert not manager.supports_fine_grained_hash_lookup
