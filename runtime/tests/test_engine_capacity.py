"""What the engine's cache holds: true page sizes, nothing beside the pages, exact baselines.

On models without weights, whose engines start in a second.
"""

import gc
from math import prod

import pytest

from turboquant_kernels.formats import COMPRESSED_FORMATS, KVFormat
from turboquant_kernels.plans import KVPlan

pytestmark = pytest.mark.engine

MEMORY = 16 << 20
BLOCK, MAX_LEN = 128, 1024
ARGUMENTS = {
    "load_format": "dummy",
    "kv_cache_memory_bytes": MEMORY,
    "max_model_len": MAX_LEN,
    "max_num_batched_tokens": 512,
}
MIXED = KVPlan(
    (KVFormat(8, 4), KVFormat.parse("bf16"), KVFormat.parse("tq-k3v4-prod"), KVFormat(4, 2)), seed=3
)
"""Four layers of four sizes, one of them in the model's own dtype."""


@pytest.fixture(scope="module")
def start(start_engine, dummy_model):
    def start(shape: str, kv_cache_dtype: str, plan: KVPlan | None = None, **arguments):
        additional = {"additional_config": {"turboquant": plan.to_dict()}} if plan else {}
        return start_engine(dummy_model(shape), kv_cache_dtype, **ARGUMENTS | additional | arguments)

    return start


def test_k4v4_holds_almost_four_times_the_tokens_of_bf16(start, record_property) -> None:
    plain, compressed = start("LLAMA", "auto"), start("LLAMA", "tq-k4v4")
    gain = compressed.capacity_tokens / plain.capacity_tokens
    record_property("capacity_gain", round(gain, 4))
    # Sequences are short here, 8 blocks, beside the 4 that hold the newest tokens uncompressed.
    assert gain * (8 + 4) / 8 >= 3.7


def tokens_of(pages: int, raw_blocks: int) -> int:
    """Tokens in sequences of the full length, in `MEMORY`: each has `raw_blocks` blocks more. `pages`: bytes
    of a block in all layers."""
    blocks = MAX_LEN // BLOCK + raw_blocks
    return int(MEMORY // pages / blocks * MAX_LEN)


@pytest.mark.parametrize(
    ("name", "raw_blocks"), [("tq-k4v4", 4), ("tq-k8v4", 3), ("tq-k3v2", 7), ("tq-k3v4-prod", 5)]
)
def test_capacity_is_exact_page_arithmetic(start, name: str, raw_blocks: int) -> None:
    pages = 4 * 2 * KVFormat.parse(name).page_bytes(128, BLOCK)
    assert start("LLAMA", name).capacity_tokens == tokens_of(pages, raw_blocks)


def test_layers_of_mixed_formats_cost_no_padding(start) -> None:
    pages = sum(2 * layer.page_bytes(128, BLOCK) for layer in MIXED.layers)
    # All layers share block tables: the raw block of the one with the smallest pages takes most blocks.
    assert start("LLAMA", "tq-k4v4", MIXED).capacity_tokens == tokens_of(pages, raw_blocks=6)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_anchors_cost_their_bytes(start_engine, dummy_model, head_dim: int) -> None:
    plan = KVPlan((KVFormat(4, 4, anchor=True),) * 4)
    engine = start_engine(
        dummy_model("LLAMA", head_dim=head_dim),
        "tq-k4v4",
        additional_config={"turboquant": plan.to_dict()},
        **ARGUMENTS,
    )
    bytes_per_token = {64: 69, 80: 86, 128: 134}[head_dim]  # of 68, 84 and 132 without
    assert engine.capacity_tokens == tokens_of(4 * 2 * bytes_per_token * BLOCK, raw_blocks=4)
    assert engine.generate([[3, 4, 5] * 100], max_tokens=4)[0].outputs[0].token_ids


@pytest.mark.parametrize("plan", [None, MIXED], ids=["k4v4", "mixed"])
def test_the_pages_are_all_bytes_of_the_cache(start, plan: KVPlan | None) -> None:
    engine = start("LLAMA", "tq-k4v4", plan)
    layers = plan.layers if plan else [KVFormat(4, 4)] * 4
    blocks = engine.runner.kv_cache_config.num_blocks
    pages = [blocks * 2 * layer.page_bytes(128, BLOCK) for layer in layers]
    tensors = engine.kv_tensors.values()
    assert [tensor.nbytes for tensor in tensors] == pages
    # One allocation of vLLM's may hold the pages of several layers.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == sum(pages)


def test_nothing_beside_the_pages_grows_with_tokens(start) -> None:
    engine = start("LLAMA", "tq-k4v4")

    def tensor_bytes() -> int:
        """All tensors that are alive in this process, each storage once."""
        import torch

        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    engine.generate([[3] * 20], max_tokens=4)
    before = tensor_bytes()
    engine.generate([[4 + i] * 1000 for i in range(8)], max_tokens=4)
    # The pages of these 8,000 tokens are 8.4 MB, their keys and values in bf16 would be 33 MB.
    assert tensor_bytes() - before < 100_000


@pytest.mark.parametrize(
    ("shape", "name", "plan"),
    [
        ("LLAMA", "tq-k4v4", None),
        ("LLAMA", "tq-k4v4", MIXED),
        ("GEMMA3", "tq-k4v4", None),
        ("GEMMA3", "tq-k3v2", None),
    ],
    ids=["llama-k4v4", "llama-mixed", "gemma3-k4v4", "gemma3-k3v2"],
)
def test_the_reported_baseline_is_what_a_bf16_engine_has(start, shape, name, plan) -> None:
    from turboquant_runtime.adapters.baseline import measure_capacity

    engine = start(shape, name, plan)
    capacity = measure_capacity(
        engine.config,
        [engine.runner.get_kv_cache_spec()],
        [MEMORY],
    )
    assert capacity.baseline_tokens == start(shape, "auto").capacity_tokens


def test_a_sliding_window_model_takes_formats_of_one_size_without_padding(start) -> None:
    """k + v is 8 in every layer, so that all groups share one page size."""
    plan = KVPlan((KVFormat(5, 3), KVFormat(4, 4), KVFormat(6, 2)) * 2)
    assert start("GEMMA3", "tq-k4v4", plan).capacity_tokens == start("GEMMA3", "tq-k4v4").capacity_tokens


def test_a_sliding_window_model_pads_formats_of_other_sizes(start) -> None:
    plan = KVPlan((KVFormat(8, 4),) * 3 + (KVFormat(4, 4),) * 3)
    engine = start("GEMMA3", "tq-k4v4", plan)
    assert engine.capacity_tokens < start("GEMMA3", "tq-k8v4").capacity_tokens * 1.01
    (output,) = engine.generate([[7, 8, 9] * 60], max_tokens=4)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize("name", sorted(f.name for f in COMPRESSED_FORMATS if "prod" in f.name))
def test_prod_formats_serve(start, name: str) -> None:
    (output,) = start("LLAMA", name).generate([[3, 4, 5] * 10], max_tokens=4)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize("head_dim", [64, 80, 96, 192, 256])
def test_other_head_sizes_serve(start_engine, dummy_model, head_dim: int) -> None:
    engine = start_engine(dummy_model("LLAMA", head_dim=head_dim), "tq-k4v4", **ARGUMENTS)
    shape = next(iter(engine.kv_tensors.values())).shape
    assert prod(shape[1:]) == 2 * KVFormat(4, 4).page_bytes(head_dim, BLOCK)
    assert engine.generate([[3, 4, 5] * 10], max_tokens=4)[0].outputs[0].token_ids
