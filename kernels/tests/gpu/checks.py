"""What must hold for a case: kernels against float64 attention from the definitions, and the readable store.

AssertionError where a bound or a promise is broken.
"""

import random

import torch
from cases import (
    BUDGET,
    HEAVY_TOKENS,
    ISSUE_OF_THE_TAIL,
    DecodeVariant,
    PrefillVariant,
    StoreVariant,
    Variant,
    decode_step,
    heavy_step,
    key_length,
    memory_of,
    prefill_step,
)
from plain_attention import torch_attend_in_float32
from store_agreement import assert_same_as_reference

from turboquant_kernels.bench import oracle, subject
from turboquant_kernels.bench.caches import DecodeStep, empty_cache, random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import Encoding
from turboquant_kernels.prefill.attention import prefill_attention
from turboquant_kernels.prefill.tiles import plan_tiles

ATTENDED_ERROR = 5e-4
"""Relative error of the float32 result that decode kernels may leave, where keys are about as long as others;
a longer one has logits that are rounded the more coarsely, by the 16 bits of a query (`key_length`)."""

ORACLE_TOKENS = 2_000_000
"""Tokens times KV heads of a step, up to which the oracle is asked of all sequences; else of some of them, of
a quarter as many: it holds some 10 KB for each, keys and values in float64."""

BF16_ROUNDING = 2.0**-8
"""Half a unit in the last place, relative: what the cast of the output may add."""

PREFILL_ERROR = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Relative error of prefill by its dtype, to which keys, values, turned queries and results are rounded: of
16-bit types four times the largest rounding. A chunk of one query and one head has come to half of that."""

PREFILL_ERROR_PROD = 1e-3
"""The same for prod where it is larger, since S is rounded to float16."""


def check(variant: Variant, draw: random.Random, device: torch.device, budget: int = BUDGET) -> float:
    """One case of a variant; the relative error of a decode step's float32 result, 0 for other kernels."""
    if isinstance(variant, DecodeVariant):
        return check_decode(variant, decode_step(variant, draw, device, budget=budget))
    if isinstance(variant, StoreVariant):
        check_store(variant, draw, device)
    else:
        check_prefill(variant, draw, device, budget)
    return 0.0


def check_decode(variant: DecodeVariant, step: DecodeStep) -> float:
    """The relative error of the float32 result."""
    run = subject.decode(step, path=variant.path)
    first = run().clone()
    again = run()
    assert torch.equal(first, again), "a repeat gives other bits"
    sequences = asked_of(step)
    exact = oracle.attention(
        step.codec,
        step.query,
        step.kv_cache,
        step.block_table,
        step.seq_lens,
        **step.options,
        scale=step.scale,
        sequences=sequences,
    )
    rows = torch.tensor(sequences)[:, None] * step.query_len + torch.arange(step.query_len)
    rows = rows.flatten().to(first.device)
    error = oracle.relative_error(first[rows], exact)
    most = ATTENDED_ERROR * key_length(step)
    assert error <= most, f"relative error {error:.2e} of the float32 result"
    output = subject.output(step, path=variant.path)()
    expected = oracle.unrotated(step.codec, exact)
    rounding = BF16_ROUNDING if output.is_cuda else 2 * BF16_ROUNDING  # Triton's interpreter truncates
    bound = rounding * expected.abs() + most * expected.norm(dim=-1, keepdim=True)
    assert output.dtype == torch.bfloat16
    assert ((output[rows].double() - expected).abs() <= bound).all(), (
        "the bf16 output is off by more than a rounding"
    )
    return error


def asked_of(step: DecodeStep) -> list[int]:
    """The sequences of which the oracle is asked, evenly spread: all of most steps."""
    tokens = [length * step.kv_cache.shape[2] for length in step.seq_lens.tolist()]
    if sum(tokens) <= ORACLE_TOKENS:
        return list(range(len(tokens)))
    count = max(1, ORACLE_TOKENS // 4 * len(tokens) // sum(tokens))
    return [len(tokens) * i // count for i in range(count)]


def check_tail(device: torch.device) -> float:
    """131,072 tokens that one program reads, half of the mass on token 3: the relative error."""

    variant = ISSUE_OF_THE_TAIL
    step = heavy_step(
        variant, random.Random(0), device, tokens=HEAVY_TOKENS, num_seqs=variant.batches[0], place=3
    )
    return check_decode(variant, step)


def check_store(variant: StoreVariant, draw: random.Random, device: torch.device) -> None:
    """What the readable store stores, up to rounding, for random tokens."""
    fmt, head_dim = variant.fmt, variant.head_dim
    codec, kv_heads = Codec(fmt, head_dim), draw.choice((1, 2, 3, 8))
    block_size = 128 if fmt.anchor else draw.choice((16, 32, 64))
    num_blocks = draw.randint(1, 3)
    capacity = num_blocks * block_size
    cpu = torch.device("cpu")
    before = random_step(codec, [capacity], kv_heads, kv_heads, cpu, block_size=block_size).kv_cache
    stored = _copied(codec, before, device)

    count = draw.choice((1, 2, draw.randint(1, capacity), capacity))
    slots = torch.tensor(draw.sample(range(capacity), count))
    slots[torch.rand(count) < 0.1] = -1
    # Keys and values as slices of one projection's output, as models have them.
    vectors = torch.randn(count, 2 * kv_heads, head_dim) * 10 ** draw.uniform(-3, 3)
    for special in (0.0, float("nan"), float("inf"), 1e-30, 6e4):
        if draw.random() < 0.3:
            vectors[draw.randrange(count), draw.randrange(2 * kv_heads)] = special
    vectors = vectors.to(variant.dtype)
    key, value = vectors.split(kv_heads, dim=1)
    subject.store(codec, *vectors.to(device).split(kv_heads, dim=1), stored, slots.to(device))
    after = _copied(codec, stored, cpu)
    assert_same_as_reference(codec, key, value, slots, before, after)
    assert torch.equal(_anchors(before), _anchors(after)), "anchors have changed"


def _copied(codec: Codec, kv_cache: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A cache from `empty_cache` on another device, anchors included."""
    copy = empty_cache(codec, *kv_cache.shape[:3], device)
    memory_of(copy).copy_(memory_of(kv_cache))
    return copy


def _anchors(kv_cache: torch.Tensor) -> torch.Tensor:
    """Bytes behind the pages of each block: uint8 [num_blocks, bytes]."""
    return memory_of(kv_cache)[:, kv_cache[0].numel() :]


def check_prefill(
    variant: PrefillVariant, draw: random.Random, device: torch.device, budget: int = BUDGET
) -> None:
    """Ragged chunks over their contexts, through decompressed tiles and plain attention in float32."""
    step, query_lens = prefill_step(variant, draw, device, budget=budget)
    results = prefill(variant, step, query_lens).split(query_lens)
    bound = PREFILL_ERROR[variant.dtype]
    if variant.fmt.encoding is Encoding.PROD:
        bound = max(bound, PREFILL_ERROR_PROD)
    for i, (query, result) in enumerate(zip(step.query.split(query_lens), results, strict=True)):
        if not len(query):
            continue
        exact = oracle.attention(
            step.codec,
            query,
            step.kv_cache,
            step.block_table[i : i + 1],
            step.seq_lens[i : i + 1],
            query_len=len(query),
            scale=step.scale,
            window=step.window,
            sinks=step.sinks,
        )
        expected = oracle.unrotated(step.codec, exact)
        error = (result.double() - expected).norm() / expected.norm()
        assert error <= bound, f"relative error {float(error):.2e} of a sequence's prefill"


def prefill(variant: PrefillVariant, step: DecodeStep, query_lens: list[int]) -> torch.Tensor:
    """What prefill makes of `cases.prefill_step`: [queries, q_heads, D] in the variant's dtype."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
    tiles = plan_tiles(starts, step.seq_lens.tolist(), capacity=variant.capacity, window=step.window)
    return prefill_attention(
        step.codec,
        step.query,
        step.kv_cache,
        step.block_table,
        [tile.to(step.query.device) for tile in tiles],
        torch_attend_in_float32,
        scale=step.scale,
        sinks=step.sinks,
    )


def check_graph(variant: DecodeVariant, draw: random.Random, device: torch.device) -> None:
    """A captured step, replayed with other lengths and queries, gives what the call gives outside a graph."""
    step = decode_step(variant, draw, device, budget=20_000)
    call = subject.output(step, path=variant.path)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    full = step.seq_lens.tolist()
    for _ in range(3):
        shorter = [draw.randint(variant.query_len, length) if length else 0 for length in full]
        step.seq_lens.copy_(torch.tensor(shorter, dtype=torch.int32))
        step.query.normal_()
        result.fill_(float("nan"))
        graph.replay()
        replayed = result.clone()
        assert torch.equal(replayed, call()), "a replay differs from the same call outside the graph"
        check_decode(variant, step)
