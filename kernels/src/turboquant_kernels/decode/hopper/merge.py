"""The merge of a sequence's splits inside the Hopper kernel, by the program that finishes last.

It saves a launch where a sequence has few splits; many are merged by `decode.merge`, which has a program for
each query head. Splits are added in order, whoever comes last, so results repeat to the bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.logits import LOG2_E, NOTHING, SOMETHING

_ELEMENTS = gl.constexpr(512)
_SPLITS = gl.constexpr(8)


@gluon.constexpr_function
def _layout(warps):
    """[splits, elements]: a thread has four neighbouring elements of all splits."""
    return gl.BlockedLayout([1, 4], [1, 32], [1, warps], [1, 0])


@gluon.jit
def merge_splits(
    attended,
    partial,
    stats,
    sinks,
    unit,
    first,
    count,
    row_of_group,
    total_rows,
    first_row,
    q_head,
    token,
    W: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
    Q_HEADS: gl.constexpr,
):
    """Writes the rows of one program of a sequence's `count` splits, items `first` and up.

    `row_of_group` is the program's place among the PROGRAMS of an item, `first_row` its first row, `q_head`
    and `token` the first query head of its KV head and the first query token of its sequence.
    """
    L: gl.constexpr = _layout(W)
    s = gl.arange(0, _SPLITS, gl.SliceLayout(1, L))[:, None]
    for start in gl.static_range(0, R * D, _ELEMENTS):
        e = start + gl.arange(0, _ELEMENTS, gl.SliceLayout(0, L))
        row = first_row + e // D
        used = (e < R * D) & (row < total_rows)
        out = ((token + row // GROUP) * Q_HEADS + q_head + row % GROUP) * D + e % D
        if sinks is None:
            maximum = gl.full([_ELEMENTS], NOTHING, gl.float32, gl.SliceLayout(0, L))
            total = gl.full([_ELEMENTS], 0.0, gl.float32, gl.SliceLayout(0, L))
        else:
            maximum = gl.load(sinks + q_head + row % GROUP, mask=used, other=0.0).to(gl.float32) * LOG2_E
            total = gl.full([_ELEMENTS], 1.0, gl.float32, gl.SliceLayout(0, L))
        result = gl.full([_ELEMENTS], 0.0, gl.float32, gl.SliceLayout(0, L))
        for begin in range(0, count, _SPLITS):
            there = (begin + s < count) & used[None, :]
            at = ((first + begin + s) * PROGRAMS + row_of_group) * R + (e // D)[None, :]
            # Other programs wrote these: past the L1 cache.
            m = gl.load(stats + at * 2, mask=there, other=NOTHING, cache_modifier=".cg")
            part = gl.load(stats + at * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            a = gl.load(partial + at * D + (e % D)[None, :], mask=there, other=0.0, cache_modifier=".cg")
            new_maximum = gl.maximum(maximum, gl.max(m, axis=0))
            decay = gl.exp2(maximum - new_maximum)
            share = gl.where(m > SOMETHING, gl.exp2(m - new_maximum[None, :]), 0.0)
            total = total * decay + gl.sum(share * part, axis=0)
            result = result * decay + gl.sum(share * a, axis=0)
            maximum = new_maximum
        result = gl.where(total == 0.0, 0.0, result * unit / total)
        gl.store(attended + out, result, mask=used)


@gluon.jit
def store_zeros(
    attended,
    total_rows,
    first_row,
    q_head,
    token,
    W: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    Q_HEADS: gl.constexpr,
):
    """Writes zeros where `merge_splits` would write: the result of a sequence without tokens."""
    L: gl.constexpr = gl.SliceLayout(0, _layout(W))
    for start in gl.static_range(0, R * D, _ELEMENTS):
        e = start + gl.arange(0, _ELEMENTS, L)
        row = first_row + e // D
        out = ((token + row // GROUP) * Q_HEADS + q_head + row % GROUP) * D + e % D
        gl.store(
            attended + out, gl.full([_ELEMENTS], 0.0, gl.float32, L), mask=(e < R * D) & (row < total_rows)
        )


@gluon.jit
def store_alone(
    attended,
    d,
    x,
    maximum,
    total,
    sinks,
    unit,
    row,
    total_rows,
    q_head,
    token,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    Q_HEADS: gl.constexpr,
):
    """Writes what `merge_splits` would write of a sequence's only split.

    x, maximum, total: float32 [R, N], [R], [R], x of the coordinates d, [1, N], row: [R], the others as
    there.
    """
    head = q_head + row % GROUP
    if sinks is None:
        share = gl.where(maximum > SOMETHING, 1.0, 0.0)
        total = total * share
    else:
        sink = gl.load(sinks + head, mask=row < total_rows, other=0.0).to(gl.float32) * LOG2_E
        highest = gl.maximum(maximum, sink)
        share = gl.where(maximum > SOMETHING, gl.exp2(maximum - highest), 0.0)
        total = total * share + gl.exp2(sink - highest)
    result = gl.where((total == 0.0)[:, None], 0.0, x * (share * unit / total)[:, None])
    out = ((token + row // GROUP) * Q_HEADS + head) * D
    gl.store(attended + out[:, None] + d, result, mask=(row < total_rows)[:, None] & (d < D))
