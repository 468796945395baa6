"""Where a tile's pages are.

A program's tile is W * P pages: P of each warp, [W, P] tensors that every lane of a warp holds.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.operands import basis


class Pages(NamedTuple):
    """The pages of a program's item, of one KV head."""

    words: Any
    """Pointer to the cache's int32 words, from the head's page 0 of block 0 on."""
    block_stride: Any
    """Words from one block to the next."""
    table_row: Any
    """Pointer to the sequence's blocks, int32."""
    first: Any
    """The item's first page, counted from the sequence's beginning."""
    end: Any
    """The page behind its last."""


@gluon.constexpr_function
def page_layout(warps, pages):
    """[warps, pages], of which every lane of a warp holds its own."""
    return gl.DistributedLinearLayout(
        basis(1, pages, 2), [[0, 0]] * 5, basis(0, warps, 2), [], [warps, pages]
    )


@gluon.constexpr_function
def offset_type(bits):
    """Of an offset in the cache."""
    return gl.int32 if bits == 32 else gl.int64


@gluon.jit
def find_tile(pages, tile, SPEC: gl.constexpr):
    """The pages of a tile of the item, and which blocks of the cache hold them: both [W, P].

    Pages behind the end are the last one.
    """
    L: gl.constexpr = page_layout(SPEC.W, SPEC.P)
    mine = gl.arange(0, SPEC.W, gl.SliceLayout(1, L))[:, None] * SPEC.P
    mine = mine + gl.arange(0, SPEC.P, gl.SliceLayout(0, L))[None, :]
    page = gl.minimum(pages.first + tile * (SPEC.W * SPEC.P) + mine, pages.end - 1)
    return page, gl.load(pages.table_row + page // SPEC.PAGES_OF_BLOCK).to(offset_type(SPEC.OFFSET_BITS))


@gluon.jit
def pointers_of(pages, found, SPEC: gl.constexpr):
    """Pointers to the pages that `find_tile` found, [W, P]."""
    page, block = found
    within = page % SPEC.PAGES_OF_BLOCK
    return pages.words + (block * pages.block_stride + within * (SPEC.KV_HEADS * SPEC.PAGE_WORDS))
