"""Where a tile's pages are.

A program's tile is W * P pages: P of each warp, [W, P] tensors that every lane of a warp holds. Offsets count
32-bit words from the start of the cache to the page of KV head 0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.operands import basis


@gluon.constexpr_function
def page_layout(warps, pages):
    """[warps, pages], of which every lane of a warp holds its own."""
    return gl.DistributedLinearLayout(
        basis(1, pages, 2), [[0, 0]] * 5, basis(0, warps, 2), [], [warps, pages]
    )


@gluon.jit
def pages_of_tile(first_page, end_page, W: gl.constexpr, P: gl.constexpr):
    """Pages of the tile that begins at `first_page`, int32 [W, P]; those behind the end are the last one."""
    L: gl.constexpr = page_layout(W, P)
    mine = gl.arange(0, W, gl.SliceLayout(1, L))[:, None] * P + gl.arange(0, P, gl.SliceLayout(0, L))[None, :]
    return gl.minimum(first_page + mine, end_page - 1)


@gluon.jit
def find_blocks(table_row, page, PAGES_OF_BLOCK: gl.constexpr, OFFSET: gl.constexpr):
    """The blocks of the cache that hold pages of a sequence, [W, P]."""
    return gl.load(table_row + page // PAGES_OF_BLOCK).to(OFFSET)


@gluon.jit
def offset_of(block, page, block_stride, PAGES_OF_BLOCK: gl.constexpr, WORDS: gl.constexpr):
    """Offsets [W, P] of pages, of which one holds WORDS words of all KV heads."""
    return block * block_stride + (page % PAGES_OF_BLOCK) * WORDS
