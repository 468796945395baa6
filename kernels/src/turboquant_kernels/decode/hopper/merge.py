"""The merge of a sequence's splits inside the Hopper kernel, by the program that finishes last.

It saves a launch where most sequences have one split; else `decode.merge` does it, with a program for each
query head. Splits are added in order, whoever comes last, so results repeat to the bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.queries import query_index
from turboquant_kernels.decode.logits import LOG2_E, NOTHING, SOMETHING

_ELEMENTS = gl.constexpr(512)
_SPLITS = gl.constexpr(8)


@gluon.constexpr_function
def _layout(warps):
    """[splits, elements]: a thread has four neighbouring elements of all splits."""
    return gl.BlockedLayout([1, 4], [1, 32], [1, warps], [1, 0])


@gluon.jit
def merge_splits(output, partial, stats, sinks, unit, rows, first, count, SPEC: gl.constexpr):
    """Writes a program's rows of a sequence's `count` splits, items `first` and up.

    The larger of the splits' references is one too: sums relative to it are no larger than a split's own.
    """
    D: gl.constexpr = SPEC.D
    R: gl.constexpr = SPEC.R
    L: gl.constexpr = _layout(SPEC.W)
    s = gl.arange(0, _SPLITS, gl.SliceLayout(1, L))[:, None]
    for start in gl.static_range(0, R * D, _ELEMENTS):
        e = start + gl.arange(0, _ELEMENTS, gl.SliceLayout(0, L))
        row = rows.first + e // D
        used = (e < R * D) & (row < rows.total)
        out = query_index(rows, row, SPEC) * D + e % D
        if sinks is None:
            maximum = gl.full([_ELEMENTS], NOTHING, gl.float32, gl.SliceLayout(0, L))
            total = gl.full([_ELEMENTS], 0.0, gl.float32, gl.SliceLayout(0, L))
        else:
            maximum = (
                gl.load(sinks + rows.query_head + row % SPEC.GROUP, mask=used, other=0.0).to(gl.float32)
                * LOG2_E
            )
            total = gl.full([_ELEMENTS], 1.0, gl.float32, gl.SliceLayout(0, L))
        result = gl.full([_ELEMENTS], 0.0, gl.float32, gl.SliceLayout(0, L))
        for begin in range(0, count, _SPLITS):
            there = (begin + s < count) & used[None, :]
            at = partial_row(first + begin + s, (e // D)[None, :], SPEC)
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
        gl.store(output + out, result, mask=used)


@gluon.jit
def store_zeros(output, rows, SPEC: gl.constexpr):
    """Writes zeros where `merge_splits` would write: the result of a sequence without tokens."""
    D: gl.constexpr = SPEC.D
    R: gl.constexpr = SPEC.R
    L: gl.constexpr = gl.SliceLayout(0, _layout(SPEC.W))
    for start in gl.static_range(0, R * D, _ELEMENTS):
        e = start + gl.arange(0, _ELEMENTS, L)
        row = rows.first + e // D
        used = (e < R * D) & (row < rows.total)
        zeros = gl.full([_ELEMENTS], 0.0, gl.float32, L)
        gl.store(output + (query_index(rows, row, SPEC) * D + e % D), zeros, mask=used)


@gluon.jit
def store_alone(output, sinks, unit, rows, d, x, reference, total, SPEC: gl.constexpr):
    """Writes what `merge_splits` would write of a sequence's only split.

    x, reference, total: float32 [R, N], [R], [R], x of the coordinates d, [1, N].
    """
    row = rows.first + gl.arange(0, SPEC.R, reference.type.layout)
    used = row < rows.total
    if sinks is None:
        share = gl.where(reference > SOMETHING, 1.0, 0.0)
        total = total * share
    else:
        sink = (
            gl.load(sinks + rows.query_head + row % SPEC.GROUP, mask=used, other=0.0).to(gl.float32) * LOG2_E
        )
        highest = gl.maximum(reference, sink)
        share = gl.where(reference > SOMETHING, gl.exp2(reference - highest), 0.0)
        total = total * share + gl.exp2(sink - highest)
    result = gl.where((total == 0.0)[:, None], 0.0, x * (share * unit / total)[:, None])
    out = query_index(rows, row, SPEC) * SPEC.D
    gl.store(output + out[:, None] + d, result, mask=used[:, None] & (d < SPEC.D))


@gluon.jit
def store_split(partial, stats, d, x, reference, total, FIRST: gl.constexpr, SPEC: gl.constexpr):
    """Stores what `merge_splits` reads of this program's split; with the FIRST coordinates its stats."""
    row = partial_row(gl.program_id(0), gl.arange(0, SPEC.R, reference.type.layout), SPEC)
    gl.store(partial + row[:, None] * SPEC.D + d, x, mask=(d < SPEC.D) & (row >= 0)[:, None])
    if FIRST:
        gl.store(stats + row * 2, reference)
        gl.store(stats + row * 2 + 1, total)


@gluon.jit
def partial_row(item, row, SPEC: gl.constexpr):
    """Where row `row` of this program's stands among the partial results [items, programs of an item, R]."""
    return (item * (SPEC.KV_HEADS * SPEC.ROW_GROUPS) + gl.program_id(1)) * SPEC.R + row
