"""Logits of key anchors: a key is what is stored plus the anchor of its 128 tokens, which is not rotated.

A warp's tile has one anchor, so its logits are added where those of the tile are scaled. They are made before
a chunk of tiles, for 16 anchors of each warp, which are rows of `mma.m16n8k16` of bf16, and wait in shared
memory. Columns are those of the integer products: two for a row of queries, of which one holds the query
rounded to bf16 and the other what is left of it, nothing where it is bf16.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.hopper.operands import basis, product_layout
from turboquant_kernels.decode.hopper.pages import offset_type
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS

ANCHOR_PAGES = gl.constexpr(BLOCK_TOKENS // PAGE_TOKENS)
"""Pages that share an anchor."""

_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))


class Anchors(NamedTuple):
    """A KV head's anchors, and the queries that they are multiplied with."""

    words: Any
    """Pointer to the cache's int32 words, from the head's first anchor of block 0 on."""
    queries: Any
    """Pointer to queries, any float [tokens, q_heads, D], not rotated."""
    token_stride: Any
    head_stride: Any
    scale: Any
    """What a product counts in a logit."""


@gluon.constexpr_function
def _warp_layout(warps, anchors, rows):
    """[anchors of a tile, warps that share one, rows]: row t in the lanes of column group t."""
    registers = basis(2, rows, 3)[2:]
    lanes = [*basis(2, 4, 3), [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    warp_bases = basis(1, warps // anchors, 3) + basis(0, anchors, 3)
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [anchors, warps // anchors, rows])


@gluon.constexpr_function
def _operand_layout(warps, index):
    """Of the first or second bf16 operand, index 0 or 1."""
    return gl.DotOperandLayout(index, product_layout(warps), 8)


@gluon.constexpr_function
def tiles_of_chunk(pages):
    """Tiles of so many pages a warp that 16 anchors a warp serve."""
    return 16 * ANCHOR_PAGES.value // pages


@gluon.constexpr_function
def _anchors_of_tile(warps, pages):
    return max(1, warps * pages // ANCHOR_PAGES.value)


@gluon.constexpr_function
def _tiles_of_anchor(warps, pages):
    return max(1, ANCHOR_PAGES.value // (warps * pages))


@gluon.jit
def _anchor_pointers(anchors, pages, tile, wanted, L: gl.constexpr, SPEC: gl.constexpr):
    """Where the 16 anchors of each warp begin, from those of a tile on: pointers to bf16, [W, 16, 1].

    Anchors behind the end are the last one. Not `wanted`, they are any.
    """
    OF_BLOCK: gl.constexpr = SPEC.PAGES_OF_BLOCK // ANCHOR_PAGES
    index = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    index += (pages.first + tile * (SPEC.W * SPEC.P)) // ANCHOR_PAGES
    index += gl.arange(0, SPEC.W, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None] * 16
    index = gl.minimum(index, (pages.end - 1) // ANCHOR_PAGES)
    block = gl.load(pages.table_row + index // OF_BLOCK, mask=wanted & (index >= 0), other=0)
    block = block.to(offset_type(SPEC.OFFSET_BITS))
    within = index % OF_BLOCK * (SPEC.KV_HEADS * SPEC.D // 2)
    vector = anchors.words + (block * pages.block_stride + within)
    return vector.to(gl.pointer_type(gl.bfloat16), bitcast=True)


@gluon.jit
def load_anchors(anchors, pages, tile, wanted, SPEC: gl.constexpr):
    """The anchors of the chunk that begins at a tile, whose first page is a multiple of `ANCHOR_PAGES`: bf16
    [W, 16, 64] for every 64 coordinates; zeros if they are not wanted."""
    D: gl.constexpr = SPEC.D
    A: gl.constexpr = _operand_layout(SPEC.W, 0)
    vector = _anchor_pointers(anchors, pages, tile, wanted, A, SPEC)
    # The second condition always holds: it gives masks the shape of what is loaded.
    wanted = wanted & (vector.to(gl.int64, bitcast=True) != 0)
    operands = ()
    for first in gl.static_range(0, D, 64):
        d = first + gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))[None, None, :]
        operands = operands + (gl.load(vector + d, mask=wanted & (d < D), other=0.0),)
    return operands


@gluon.jit
def store_logits(memory, loaded, anchors, rows, SPEC: gl.constexpr):
    """Makes the logits of a chunk of tiles with its anchors, as `load_anchors` has them."""
    D: gl.constexpr = SPEC.D
    W: gl.constexpr = SPEC.W
    R: gl.constexpr = SPEC.R
    B: gl.constexpr = _operand_layout(W, 1)
    column = gl.arange(0, 2 * R, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    row = rows.first + column // 2
    query = (rows.token + row // SPEC.GROUP) * anchors.token_stride
    query += (rows.query_head + row % SPEC.GROUP) * anchors.head_stride
    # Zeros that give a tensor its dimension of warps, each of which holds a copy.
    no_warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 0
    query += no_warp
    used = (row < rows.total) & (no_warp == 0)
    products = gl.full([W, 16, 2 * R], 0.0, gl.float32, product_layout(W))
    for i in gl.static_range(len(loaded)):
        d = i * 64 + gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
        q = gl.load(anchors.queries + query + d, mask=used & (d < D), other=0.0).to(gl.float32)
        rounded = q.to(gl.bfloat16)
        left = (q - rounded.to(gl.float32)).to(gl.bfloat16)
        products = mma_v2(loaded[i], gl.where(column % 2 == 0, rounded, left), products)
    of_rounded, of_left = gl.split(gl.reshape(products, [W, 16, R, 2]))
    memory._reinterpret(gl.float32, [16 * W, R], _ROWS).store(
        gl.reshape((of_rounded + of_left) * anchors.scale, [16 * W, R])
    )
    gl.barrier()


@gluon.jit
def load_logits(memory, tile, ROW: gl.constexpr, SPEC: gl.constexpr):
    """Those of the anchors of a tile of the chunk, each warp's own: float32 [W, R]."""
    OF_TILE: gl.constexpr = _anchors_of_tile(SPEC.W, SPEC.P)
    L: gl.constexpr = _warp_layout(SPEC.W, OF_TILE, SPEC.R)
    logits = memory._reinterpret(gl.float32, [16 * SPEC.W // OF_TILE, OF_TILE, SPEC.R], _ROWS)
    x = logits.index(tile // _tiles_of_anchor(SPEC.W, SPEC.P)).load(gl.SliceLayout(1, L))
    x, _ = gl.broadcast(x[:, None, :], gl.full([OF_TILE, SPEC.W // OF_TILE, SPEC.R], 0.0, gl.float32, L))
    return gl.convert_layout(gl.reshape(x, [SPEC.W, SPEC.R]), ROW, assert_trivial=True)
