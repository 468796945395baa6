"""The end of an item: its warps' sums become one, by way of shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.values import value_chunks

_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
_SUMS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, order=[2, 1, 0]))


@gluon.constexpr_function
def _read_layout(warps, rows, block):
    """[warps, rows, coordinates]: a thread has four neighbouring coordinates of all warps."""
    across = min(32, block // 4)
    return gl.BlockedLayout([warps, 1, 4], [1, 32 // across, across], [1, warps, 1], [2, 1, 0])


@gluon.jit
def share_rows(x, SPEC: gl.constexpr):
    """Puts what each warp has of each row, float32 [W, R], into shared memory."""
    return gl.allocate_shared_memory(gl.float32, [SPEC.W, SPEC.R], _ROWS, x)


@gluon.jit
def share_sums(sums, half_weight, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """Puts the parts of block INDEX of `sums`, float32 [W, M, R] in the order of the value operand, plus
    `half_weight` [W, R], into shared memory: [W, R, coordinates], in order."""
    W: gl.constexpr = SPEC.W
    R: gl.constexpr = SPEC.R
    BITS: gl.constexpr = SPEC.VALUE_BITS
    BLOCK: gl.constexpr = SPEC.VALUE_BLOCKS[INDEX]
    PARTS: gl.constexpr = SPEC.PARTS
    parts = ()
    for part in gl.static_range(PARTS):
        parts = parts + (sums[PARTS * INDEX + part],)
    half = gl.convert_layout(half_weight, gl.SliceLayout(1, parts[0].type.layout), assert_trivial=True)
    half = half[:, None, :]
    if BITS == 8:
        C: gl.constexpr = value_chunks(8, BLOCK)
        x = gl.reshape(parts[0] + half, [W, C[0], C[1], 8, R])
        x = gl.permute(x, [0, 4, 1, 3, 2])
    elif BITS == 4:
        C: gl.constexpr = value_chunks(4, BLOCK)
        x = gl.join(parts[0] + half, parts[1] + half)
        x = gl.permute(gl.reshape(x, [W, C[0], C[1], 8, R, 2]), [0, 4, 1, 3, 2, 5])
    else:
        x = gl.join(parts[0] + half, parts[1] + half)
        x = gl.permute(gl.reshape(x, [W, BLOCK // 32, 2, 8, R, 2]), [0, 4, 3, 1, 5, 2])
    return gl.allocate_shared_memory(gl.float32, [W, R, BLOCK], _SUMS, gl.reshape(x, [W, R, BLOCK]))


@gluon.jit
def merge_warps(sums, references, totals, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """What was shared of all warps: sums of a block [R, coordinates], references and sums of weights [R]."""
    L: gl.constexpr = _read_layout(SPEC.W, SPEC.R, SPEC.VALUE_BLOCKS[INDEX])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, L))
    m = references.load(gl.SliceLayout(2, L))
    highest = gl.max(m, axis=0)
    share = gl.exp2(m - highest[None, :])
    total = gl.sum(totals.load(gl.SliceLayout(2, L)) * share, axis=0)
    x = gl.sum(sums.load(L) * share[:, :, None], axis=0)
    highest = gl.convert_layout(highest, ROW, assert_trivial=True)
    return x, highest, gl.convert_layout(total, ROW, assert_trivial=True)
