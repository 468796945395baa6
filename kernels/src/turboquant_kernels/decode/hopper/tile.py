"""A tile of pages: what its tokens add to the attention of a program's rows.

Logits are in base 2. A value's scale multiplies its token's weight, so its logarithm is added to the logit.
Levels are step * (c + 1/2): the halves enter by the sum of the query's coordinates and the sum of the
weights.

Weights and sums are relative to 2**reference. Weights of 15 bits would lose whatever follows one heavy token
if that were the largest logit so far, so it is the tile's own: each tile's weights are rounded relative to
its own largest one, and what was summed before is multiplied by 2**(old reference - new reference). That may
be more than 1, so the reference stays within `_REACH` of the largest logit of all.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.hopper.anchors import load_logits
from turboquant_kernels.decode.hopper.operands import key_operand, product_layout
from turboquant_kernels.decode.hopper.queries import query_operand
from turboquant_kernels.decode.hopper.ring import load_keys, load_scales, load_values
from turboquant_kernels.decode.hopper.values import add_sums, no_sums, sum_values, value_operand, weights_of
from turboquant_kernels.decode.logits import LOG2_E, NOTHING
from turboquant_kernels.formats import BLOCK_TOKENS

_REACH = gl.constexpr(40.0)
"""Powers of two that a reference may lie below the largest logit. What a tile that far below adds is less
than 2**-40 of the largest token's part for each token: a million of them are 2**-20. And sums stay finite in
float32. A token adds at most 2**40 to `scaled` and 2**40 * 32512 * 128 < 2**62 to `sums`. To `total`, from
which its value's scale is left out, it adds at most 2**40 / 2**-40, the least scale being 2**-40. All splits
of a sequence of 2**24 tokens add up to less than 2**104."""

_BLOCK_MASK = gl.constexpr(-BLOCK_TOKENS)

_LOG2 = gl.constexpr("lg2.approx.ftz.f32 $0, $1;")


class SoftmaxState(NamedTuple):
    """What each warp knows of the tokens that it has read."""

    maximum: Any
    """float32 [W, R]: the largest sum of a logit and the logarithm of its value's scale, `NOTHING` where a
    row has seen no token."""
    reference: Any
    """float32 [W, R]: what the following are relative to, as powers of two; `NOTHING` with the maximum."""
    total: Any
    """float32 [W, 8, R]: sums of weights, of each lane's own tokens."""
    scaled: Any
    """float32 [W, 8, R]: sums of weights times values' scales."""
    sums: tuple[Any, ...]
    """Sums of values, as `values.no_sums` lays them out."""


class Tables(NamedTuple):
    """Words of the tables of levels, as `operands.load_table` has them."""

    of_keys: tuple[Any, ...]
    of_values: tuple[Any, ...]


class Limits(NamedTuple):
    """What is made of logits."""

    seen_by_all: Any
    """Positions that every row sees, from the first one on."""
    window: Any
    """Positions that a row sees, with WINDOW."""
    soft_cap: Any
    """In base 2, with SOFT_CAP."""


@gluon.jit
def block_start(position):
    """The first position of a position's block, which its query sees raw."""
    return position & _BLOCK_MASK


@gluon.jit
def no_logits(SPEC: gl.constexpr):
    """Zeros as logits are laid out, float32 [W, 16 P tokens, R]."""
    products = gl.full([SPEC.W, SPEC.P * 16, 2 * SPEC.R], 0.0, gl.float32, product_layout(SPEC.W))
    zeros, _ = gl.split(gl.reshape(products, [SPEC.W, SPEC.P * 16, SPEC.R, 2]))
    return zeros


@gluon.jit
def empty_state(SPEC: gl.constexpr):
    """`SoftmaxState` of no tokens."""
    S: gl.constexpr = no_logits(SPEC).type.layout
    maximum = gl.full([SPEC.W, SPEC.R], NOTHING, gl.float32, gl.SliceLayout(1, S))
    zeros = _sum_of_lanes(no_logits(SPEC), SPEC)
    return SoftmaxState(maximum, maximum, zeros, zeros, no_sums(SPEC))


@gluon.jit
def attend_tile(state, tile, position, anchor_logits, index, queries, tables, limits, SPEC: gl.constexpr):
    """A state and a tile that has come to the addresses `tile`, whose first token has this position.

    anchor_logits: what `anchors.store_logits` wrote, with ANCHOR; the tile is number `index` of its chunk.
    """
    s = _products(tile, queries, tables.of_keys, SPEC)
    S: gl.constexpr = s.type.layout
    key_scale, value_scale = load_scales(tile, S, SPEC)
    s = (s * queries.scale[:, None, :] + queries.half_sum[:, None, :]) * key_scale
    if SPEC.ANCHOR:
        s += load_logits(anchor_logits, index, gl.SliceLayout(1, S), SPEC)[:, None, :]
    if SPEC.SOFT_CAP:
        # cap * tanh(s / cap), of which logits and cap are in base 2.
        s = limits.soft_cap - 2.0 * limits.soft_cap / (gl.exp2(s * (2.0 * LOG2_E / limits.soft_cap)) + 1.0)
    weighted = s + _log2_of_scale(value_scale)
    # Most tiles are seen whole. Slots behind the end hold anything, NaN too.
    WINDOW: gl.constexpr = SPEC.WINDOW
    if WINDOW or position + SPEC.W * SPEC.P * 16 > limits.seen_by_all:
        token = gl.arange(0, SPEC.P * 16, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :, None]
        token += gl.arange(0, SPEC.W, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None, None] * (SPEC.P * 16)
        if SPEC.RAW_BLOCK:
            seen = position + token < block_start(queries.position)[:, None, :]
        else:
            seen = position + token <= queries.position[:, None, :]
        if WINDOW:
            seen = seen & (position + token > queries.position[:, None, :] - limits.window)
        s = gl.where(seen, s, NOTHING)
        weighted = gl.where(seen, weighted, NOTHING)
    # A tile of which a row sees nothing: before others all is `NOTHING`, and what weights of 1 sum up here is
    # multiplied by 0 once the row sees a token; after others the reference falls, and weights are 0.
    of_tile = gl.max(weighted, axis=1)
    maximum = gl.maximum(state.maximum, of_tile)
    reference = gl.maximum(of_tile, maximum - _REACH)
    decay = gl.exp2(state.reference - reference)
    p = gl.exp2(weighted - reference[:, None, :])
    lane_decay = gl.convert_layout(decay, gl.SliceLayout(1, state.total.type.layout), assert_trivial=True)
    lane_decay = lane_decay[:, None, :]
    total = state.total * lane_decay + _sum_of_lanes(gl.exp2(s - reference[:, None, :]), SPEC)
    scaled = state.scaled * lane_decay + _sum_of_lanes(p, SPEC)
    sums = _add_values(state.sums, decay, tile, tables.of_values, weights_of(p, SPEC), SPEC)
    return SoftmaxState(maximum, reference, total, scaled, sums)


@gluon.jit
def _products(tile, queries, registers, SPEC: gl.constexpr):
    """Integer products of a tile's keys and the queries, halves put together: float32 [W, 16 P tokens, R]."""
    products = gl.full([SPEC.W, SPEC.P * 16, 2 * SPEC.R], 0, gl.int32, product_layout(SPEC.W))
    packed = ()
    for i in gl.static_range(len(SPEC.KEY_BLOCKS)):
        packed = packed + (load_keys(tile, i, SPEC),)
    for i in gl.static_range(len(SPEC.KEY_BLOCKS)):
        k8 = key_operand(packed[i], registers, i, SPEC)
        products = mma_v2(k8, query_operand(queries, i, SPEC), products)
    high, low = gl.split(gl.reshape(products, [SPEC.W, SPEC.P * 16, SPEC.R, 2]))
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def _log2_of_scale(scale):
    """Base-2 logarithm of fp16 scales in float32. 2**-40 is added, which is nothing to any scale but zero."""
    return gl.inline_asm_elementwise(
        _LOG2, "=f,f", [scale + 2.0**-40], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _sum_of_lanes(x, SPEC: gl.constexpr):
    """Sums of each lane's own tokens, [W, 16 P tokens, R] -> [W, 8, R]."""
    return gl.sum(gl.reshape(x, [SPEC.W, 2 * SPEC.P, 8, SPEC.R]), axis=1)


@gluon.jit
def _add_values(sums, decay, tile, registers, weights, SPEC: gl.constexpr):
    """sums * decay + the tile's values times their weights."""
    PARTS: gl.constexpr = SPEC.PARTS
    result = ()
    for i in gl.static_range(len(SPEC.VALUE_BLOCKS)):
        v = value_operand(load_values(tile, i, SPEC), registers, i, SPEC)
        if SPEC.R == 4:
            # The products of both parts first is faster where their sums take few registers.
            products = ()
            for part in gl.static_range(PARTS):
                products = products + (sum_values(sums[PARTS * i + part], v, weights[part], SPEC.W),)
            for part in gl.static_range(PARTS):
                result = result + (add_sums(sums[PARTS * i + part], decay, products[part]),)
        else:
            for part in gl.static_range(PARTS):
                x = sums[PARTS * i + part]
                result = result + (add_sums(x, decay, sum_values(x, v, weights[part], SPEC.W)),)
    return result
