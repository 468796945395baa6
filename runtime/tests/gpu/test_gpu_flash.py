"""vLLM's FlashAttention as the prefill's attention: no engine, one layer against float64.

The kernels' own tests give the prefill PyTorch's attention. Where a context is cut into tiles, and beside a
sink, its results depend on the log-sum-exp too; where a window is, on what FlashAttention makes of a bound on
the left alone.
"""

import pytest
import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, KVFormat
from turboquant_kernels.prefill import blocks
from turboquant_kernels.prefill.attention import flash_page_tokens, prefill_attention
from turboquant_kernels.prefill.pieces import plan_pieces
from turboquant_kernels.prefill.tiles import plan_tiles
from turboquant_kernels.store.kernel import store

pytestmark = pytest.mark.gpu

TOKENS, HEADS, KV_HEADS, BLOCK = 700, 4, 2, 16
SINKS = (11.0, 8.0, 10.0, 4.0)


@pytest.fixture(params=[64, 128])
def head_dim(request) -> int:
    return request.param


@pytest.fixture(params=[None, 64, 400], ids=["all tokens", "window", "large window"])
def window(request) -> int | None:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "sinks"])
def sinks(request) -> torch.Tensor | None:
    return torch.tensor(SINKS, dtype=torch.bfloat16, device="cuda") if request.param else None


@pytest.fixture
def layer(head_dim: int) -> list[torch.Tensor]:
    """query, key and value of one sequence: scores spread by 4."""
    torch.manual_seed(0)
    return [
        torch.randn(TOKENS, heads, head_dim, dtype=torch.bfloat16, device="cuda") * gain
        for heads, gain in ((HEADS, 2), (KV_HEADS, 2), (KV_HEADS, 1))
    ]


def exact(layer, window: int | None, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [tokens, heads, D] and log-sum-exp [heads, tokens] in float64; a sink is in the output alone."""
    query, key, value = (x.double() for x in layer)
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    score = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    score = score.masked_fill(~seen_keys(window), -torch.inf)
    total = score.logsumexp(-1)
    with_sink = total if sinks is None else torch.logaddexp(total, sinks.double()[:, None])
    return torch.einsum("hqk,khd->qhd", (score - with_sink[..., None]).exp(), value), total


def seen_keys(window: int | None) -> torch.Tensor:
    """Which keys each query sees: bool [tokens, tokens]."""
    position = torch.arange(TOKENS, device="cuda")
    seen = position <= position[:, None]
    return seen if window is None else seen & (position > position[:, None] - window)


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return ((output.double() - expected).norm() / expected.norm()).item()


def test_its_output_and_log_sum(layer, head_dim: int, window: int | None) -> None:
    from turboquant_runtime.backends.flash import flash_attention

    starts = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    output, log_sum = flash_attention(head_dim)(
        *layer,
        query_starts=starts,
        key_starts=starts,
        max_queries=TOKENS,
        max_keys=TOKENS,
        scale=head_dim**-0.5,
        causal=True,
        left=None if window is None else window - 1,
        soft_cap=None,
    )
    expected, expected_log_sum = exact(layer, window, None)
    assert relative(output, expected) < 0.01
    torch.testing.assert_close(log_sum.double(), expected_log_sum, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("window", "first_query", "first_key", "end_key"),
    [(350, 400, 48, 384), (450, 400, 0, 256), (620, 690, 64, 96)],
    ids=["more keys than queries", "fewer keys than queries", "few queries"],
    indirect=["window"],
)
def test_the_first_segment_of_a_window(
    layer, head_dim: int, window: int, first_query: int, first_key: int, end_key: int
) -> None:
    """Keys that precede all queries and of which the last query sees one at least, beside a whole segment."""
    from turboquant_runtime.backends.flash import flash_attention

    query, key, value = layer
    queries, keys = slice(first_query, TOKENS), slice(first_key, end_key)
    count, left = TOKENS - first_query, window - 1 - (TOKENS - end_key)
    # The same twice: in a batch of their own segments the bounds are those of each.
    output, log_sum = flash_attention(head_dim)(
        torch.cat([query[queries]] * 2),
        torch.cat([key[keys]] * 2),
        torch.cat([value[keys]] * 2),
        query_starts=torch.tensor([0, count, 2 * count], dtype=torch.int32, device="cuda"),
        key_starts=torch.tensor([0, end_key - first_key, 2 * (end_key - first_key)]).int().cuda(),
        max_queries=count,
        max_keys=end_key - first_key,
        scale=head_dim**-0.5,
        causal=False,
        left=left,
        soft_cap=None,
    )
    group = HEADS // KV_HEADS
    key, value = (x[keys].double().repeat_interleave(group, dim=1) for x in (key, value))
    score = torch.einsum("qhd,khd->hqk", query[queries].double(), key) * head_dim**-0.5
    score = score.masked_fill(~seen_keys(window)[queries, keys], -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", score.softmax(-1), value)
    for half in (output[:count], output[count:]):
        assert relative(half, expected) < 0.01
    for half in (log_sum[:, :count], log_sum[:, count:]):
        torch.testing.assert_close(half.double(), score.logsumexp(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("capacity", [1024, 256], ids=["one tile", "tiles"])
def test_a_prefill_reads_what_the_pages_hold(
    layer, head_dim: int, window: int | None, sinks: torch.Tensor | None, capacity: int
) -> None:
    """At 8 bits, whose own error is the bound."""
    from turboquant_runtime.backends.flash import flash_attention

    query, key, value = layer
    codec, blocks = Codec(KVFormat(8, 8), head_dim), -(-TOKENS // BLOCK)
    shape = (blocks, BLOCK, KV_HEADS, codec.fmt.slot_bytes(head_dim))
    cache = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    store(codec, key, value, cache, torch.arange(TOKENS, device="cuda"))
    tiles = plan_tiles([0, TOKENS], [TOKENS], capacity=capacity, window=window)
    output = prefill_attention(
        codec,
        query,
        cache,
        torch.arange(blocks, dtype=torch.int32, device="cuda")[None],
        [tile.to(query.device) for tile in tiles],
        flash_attention(head_dim),
        scale=head_dim**-0.5,
        sinks=sinks,
    )
    assert relative(output, exact(layer, window, sinks)[0]) < 0.03


@pytest.mark.parametrize("first", [0, 300], ids=["whole", "begun block"])
@pytest.mark.parametrize(("capacity", "version"), [(1024, 2), (1024, 3), (256, 3)])
def test_a_prefill_in_pieces(
    layer,
    head_dim: int,
    window: int | None,
    sinks: torch.Tensor | None,
    capacity: int,
    version: int,
    first: int,
) -> None:
    """At 8 bits, whose own error is the bound, through pages of a block and larger ones, which overlap."""
    from turboquant_runtime.backends.flash import flash_attention

    query, key, value = layer
    codec = Codec(KVFormat(8, 8), head_dim)
    shape = (-(-TOKENS // BLOCK_TOKENS), BLOCK_TOKENS, KV_HEADS, codec.fmt.slot_bytes(head_dim))
    cache = torch.zeros(shape, dtype=torch.uint8, device="cuda")
    store(codec, key, value, cache, torch.arange(TOKENS, device="cuda"))
    plan = plan_pieces(
        [0, TOKENS - first],
        [TOKENS],
        capacity=capacity,
        window=window,
        page_tokens=flash_page_tokens(head_dim, version),
        device=query.device,
    )
    own = slice(first // BLOCK_TOKENS * BLOCK_TOKENS, TOKENS)
    output = blocks.prefill_attention(
        codec,
        query[first:],
        key[own],
        value[own],
        cache,
        torch.arange(len(cache), dtype=torch.int32, device="cuda")[None],
        plan,
        flash_attention(head_dim),
        scale=head_dim**-0.5,
        sinks=sinks,
    )
    assert relative(output, exact(layer, window, sinks)[0][first:]) < 0.03


def test_vllms_own_sinks(layer, head_dim: int, window: int | None) -> None:
    """What an engine with vLLM's own cache makes of them is the same."""
    from vllm.v1.attention.backends import fa_utils

    if fa_utils.get_flash_attn_version(head_size=head_dim) != 3:
        pytest.skip("FlashAttention 3 alone is known to take sinks")
    starts = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    sinks = torch.tensor(SINKS, dtype=torch.bfloat16, device="cuda")
    output = fa_utils.flash_attn_varlen_func(
        *layer,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=TOKENS,
        max_seqlen_k=TOKENS,
        softmax_scale=head_dim**-0.5,
        causal=True,
        window_size=[-1, -1] if window is None else [window - 1, 0],
        fa_version=3,
        s_aux=sinks,
    )
    assert relative(output, exact(layer, window, sinks)[0]) < 0.01
