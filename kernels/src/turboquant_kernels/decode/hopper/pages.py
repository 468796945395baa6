"""Where a tile's pages are, and the loads of their keys, values and scales.

A program's tile is W * P pages: P of each warp, [W, P] tensors that every lane of a warp holds. Offsets count
32-bit words from the start of the cache to the page of KV head 0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.operands import basis, blocks_of, load_keys


@gluon.constexpr_function
def _page_layout(warps, pages):
    return gl.DistributedLinearLayout(
        basis(1, pages, 2), [[0, 0]] * 5, basis(0, warps, 2), [], [warps, pages]
    )


@gluon.constexpr_function
def _scale_layout(warps, pages):
    """[warps, pages, 2, 8, 2]: token 8 * n0 + r of a page in the four lanes of row r; key and value scale."""
    registers = basis(4, 2, 5) + basis(2, 2, 5) + basis(1, pages, 5)
    lanes = [[0] * 5, [0] * 5, *basis(3, 8, 5)]
    return gl.DistributedLinearLayout(registers, lanes, basis(0, warps, 5), [], [warps, pages, 2, 8, 2])


@gluon.jit
def pages_of_tile(first_page, end_page, W: gl.constexpr, P: gl.constexpr):
    """Pages of the tile that begins at `first_page`, int32 [W, P]; those behind the end are the last one."""
    L: gl.constexpr = _page_layout(W, P)
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


@gluon.constexpr_function
def _prefetch_text(words):
    return (
        "{ .reg .pred p; elect.sync _|p, 0xffffffff;"
        f" @p cp.async.bulk.prefetch.L2.global [$1], {4 * words}; mov.b32 $0, 0; }}"
    )


@gluon.jit
def prefetch(base, offset, WORDS: gl.constexpr):
    """Starts the way of pages of WORDS words to the L2 cache, each by one instruction of one lane."""
    gl.inline_asm_elementwise(
        _prefetch_text(WORDS), "=r,l", [base + offset], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_tile_keys(base, offset, W: gl.constexpr, P: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr):
    """Packed keys of a tile: for each block of up to 128 coordinates, its planes."""
    BLOCKS: gl.constexpr = blocks_of(D, 128)
    keys = ()
    for i in gl.static_range(len(BLOCKS)):
        keys = keys + (load_keys(base, offset, W, P, BITS, D, BLOCKS[i], i * 128),)
    return keys


@gluon.jit
def load_scales(base, offset, W: gl.constexpr, P: gl.constexpr):
    """A tile's key and value scales, fp16 [W, P, 2, 8, 2]."""
    L: gl.constexpr = _scale_layout(W, P)
    r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, L)))))
    n0 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L)))))
    kv = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))))
    within = (n0[None, None, :, None, None] * 8 + r[None, None, None, :, None]) * 2
    within = within + kv[None, None, None, None, :]
    offset = gl.convert_layout(
        offset, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L))), assert_trivial=True
    )
    return gl.load((base + within) + offset[:, :, None, None, None] * 2)
