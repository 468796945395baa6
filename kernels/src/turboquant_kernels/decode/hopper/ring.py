"""A ring of tiles in shared memory: each warp's pages come by bulk copies while it computes the tile before.

A page is one copy, asked for by one lane. Each warp has its own `STAGES` tiles, and for each an mbarrier that
says when all of its pages have come; no warp waits for another, and what has come takes no registers until it
is wanted. A program's shared memory is allocated at once and begins with

    [warps, STAGES, P] pages | [warps, STAGES] mbarriers | up to a whole row

Rows have as many bytes as a block of 128 coordinates of the queries.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper import launch
from turboquant_kernels.decode.hopper.operands import basis, load_words, shared_address
from turboquant_kernels.decode.hopper.pages import page_layout
from turboquant_kernels.decode.hopper.values import value_chunks

STAGES = gl.constexpr(launch.STAGES)

_INIT = gl.constexpr(
    "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.init.shared::cta.b64 [$1], 1;"
    " fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff; mov.b32 $0, 0; }"
)
_WAIT = gl.constexpr(
    "{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra.uni W; mov.b32 $0, 0; }"
)
_SCALES = gl.constexpr(
    "{ .reg .b16 a, b; .reg .b32 x; ld.shared.b32 x, [$2]; mov.b32 {a, b}, x;"
    " cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
)
_EVICT_FIRST = 0x12F0000000000000
"""The L2 cache's policy for what is read once, as `createpolicy` encodes it."""


class Ring(NamedTuple):
    """Addresses in shared memory, int32 of one element a warp, [W, 1]."""

    tiles: Any
    """Of the first stage's tile."""
    arrivals: Any
    """Of the first stage's mbarrier."""


@gluon.constexpr_function
def _expect_text(size):
    """One lane says how many bytes will come, after all lanes have read what was there."""
    return (
        "{ .reg .pred p, q; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff;"
        " setp.ne.and.b32 q, $2, 0, p;"
        f" @q mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {size}; mov.b32 $0, 0; }}"
    )


@gluon.constexpr_function
def _copy_text(size, evict_first):
    hint, policy = (".L2::cache_hint", ", h") if evict_first else ("", "")
    return (
        "{ .reg .pred p, q; .reg .b64 h; elect.sync _|p, 0xffffffff; setp.ne.and.b32 q, $4, 0, p;"
        f" mov.b64 h, {_EVICT_FIRST};"
        f" @q cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{hint}"
        f" [$1], [$2], {size}, [$3]{policy}; mov.b32 $0, 0; }}"
    )


@gluon.constexpr_function
def _word_layout(warps, pages, chunks):
    """[warps, pages, chunks, 32 lanes]."""
    registers = basis(2, chunks, 4) + basis(1, pages, 4)
    return gl.DistributedLinearLayout(
        registers, basis(3, 32, 4), basis(0, warps, 4), [], [warps, pages, chunks, 32]
    )


@gluon.constexpr_function
def _scale_layout(warps, pages):
    """[warps, pages, 2, 8]: token 8 * n0 + r of a page in the four lanes of row r."""
    registers = basis(2, 2, 4) + basis(1, pages, 4)
    lanes = [[0] * 4, [0] * 4, *basis(3, 8, 4)]
    return gl.DistributedLinearLayout(registers, lanes, basis(0, warps, 4), [], [warps, pages, 2, 8])


@gluon.jit
def make_ring(SPEC: gl.constexpr):
    """The ring, whose mbarriers are made ready."""
    warp = gl.arange(0, SPEC.W, gl.SliceLayout(1, page_layout(SPEC.W, 1)))[:, None]
    tiles = shared_address(warp * (STAGES * SPEC.P * SPEC.PAGE_WORDS * 4))
    arrivals = shared_address(warp * (STAGES * 8) + SPEC.W * STAGES * SPEC.P * SPEC.PAGE_WORDS * 4)
    for stage in gl.static_range(STAGES):
        gl.inline_asm_elementwise(
            _INIT, "=r,r", [arrivals + 8 * stage], dtype=gl.int32, is_pure=False, pack=1
        )
    return Ring(tiles, arrivals)


@gluon.jit
def tile_at(ring, stage, SPEC: gl.constexpr):
    """Addresses of a stage's tile."""
    return ring.tiles + stage * (SPEC.P * SPEC.PAGE_WORDS * 4)


@gluon.jit
def fill(ring, stage, pages, wanted, SPEC: gl.constexpr):
    """Asks for a tile's pages, pointers [W, P], if `wanted`, once all lanes of the warp are here."""
    BYTES: gl.constexpr = SPEC.PAGE_WORDS * 4
    arrival = ring.arrivals + stage * 8
    asked = gl.full([SPEC.W, 1], 0, gl.int32, arrival.type.layout) + wanted.to(gl.int32)
    gl.inline_asm_elementwise(
        _expect_text(SPEC.P * BYTES), "=r,r,r", [arrival, asked], dtype=gl.int32, is_pure=False, pack=1
    )
    page = gl.arange(0, SPEC.P, gl.SliceLayout(0, page_layout(SPEC.W, SPEC.P)))[None, :]
    gl.inline_asm_elementwise(
        _copy_text(BYTES, SPEC.EVICT_FIRST),
        "=r,r,l,r,r",
        [
            _each(tile_at(ring, stage, SPEC), SPEC) + page * BYTES,
            pages,
            _each(arrival, SPEC),
            _each(asked, SPEC),
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _each(x, SPEC: gl.constexpr):
    """[W, 1] for each of P pages: [W, P]."""
    L: gl.constexpr = page_layout(SPEC.W, SPEC.P)
    x = gl.convert_layout(gl.reshape(x, [SPEC.W]), gl.SliceLayout(1, L), assert_trivial=True)
    y, _ = gl.broadcast(x[:, None], gl.full([SPEC.W, SPEC.P], 0, gl.int32, L))
    return y


@gluon.jit
def wait(ring, stage, parity):
    """Returns once a stage's tile has come; `parity` is that of how often the stage was filled before."""
    arrival = ring.arrivals + stage * 8
    parity = gl.full(arrival.shape, 0, gl.int32, arrival.type.layout) + parity
    gl.inline_asm_elementwise(_WAIT, "=r,r,r", [arrival, parity], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _words_at_once(words, row):
    """Of `words` neighbours in rows of `row` words, which begin where the first row does: 1, 2 or 4."""
    return min(4, words, row & -row)


@gluon.jit
def _load_plane(
    tile,
    FIRST: gl.constexpr,
    CHUNKS: gl.constexpr,
    WORDS: gl.constexpr,
    ROW: gl.constexpr,
    KEYS: gl.constexpr,
    SHARED: gl.constexpr,
    SPEC: gl.constexpr,
):
    """Words of a plane that begins at word FIRST of a page, rows ROW words apart: WORDS [W, P, CHUNKS, 32].

    Lane 4 r + t reads WORDS words a chunk. KEYS: a row is a token's; chunk n0 is token 8 n0 + r, of which
    the lane reads quarter t; SHARED lanes read the same words. Else a row is that of four tokens; the lane
    reads row t, of each chunk eighth r.
    """
    L: gl.constexpr = _word_layout(SPEC.W, SPEC.P, CHUNKS)
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    c = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    page = gl.arange(0, SPEC.P, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[
        None, :, None, None
    ]
    if KEYS:
        within = lane // 4 * ROW + lane % 4 // SHARED * WORDS
        STEP: gl.constexpr = 8 * ROW
    else:
        within = lane % 4 * ROW + lane // 4 * WORDS
        STEP: gl.constexpr = 8 * WORDS
    at = (
        (_of_warp(tile, SPEC.W, L) + within * 4) + (page * (SPEC.PAGE_WORDS * 4) + c * (STEP * 4)) + FIRST * 4
    )
    return load_words(at, WORDS, _words_at_once(WORDS, ROW))


@gluon.jit
def _of_warp(tile, W: gl.constexpr, L: gl.constexpr):
    """[W, 1] -> [W, 1, 1, 1]."""
    OF_WARP: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    return gl.convert_layout(gl.reshape(tile, [W]), OF_WARP, assert_trivial=True)[:, None, None, None]


@gluon.jit
def load_keys(tile, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """Packed keys of a block of coordinates: the words of one plane after the other."""
    BITS: gl.constexpr = SPEC.KEY_BITS
    BLOCK: gl.constexpr = SPEC.KEY_BLOCKS[INDEX]
    FIRST: gl.constexpr = 128 * INDEX
    WIDTH: gl.constexpr = 8 if BITS == 8 else (2 if BITS < 4 else 4)
    words = _load_plane(
        tile, FIRST * WIDTH // 32, 2, BLOCK * WIDTH // 128, SPEC.D * WIDTH // 32, True, 1, SPEC
    )
    if BITS == 3 or BITS == 5 or BITS == 6:
        AT: gl.constexpr = SPEC.D * WIDTH // 2 + FIRST // 32
        SHARED: gl.constexpr = 128 // BLOCK
        words = words + _load_plane(tile, AT, 2, 1, SPEC.D // 32, True, SHARED, SPEC)
        if BITS == 6:
            words = words + _load_plane(tile, AT + SPEC.D // 2, 2, 1, SPEC.D // 32, True, SHARED, SPEC)
    return words


@gluon.jit
def load_values(tile, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """Packed values of a block of coordinates: a tensor a plane, [W, P, chunks, 32, words]."""
    BITS: gl.constexpr = SPEC.VALUE_BITS
    BLOCK: gl.constexpr = SPEC.VALUE_BLOCKS[INDEX]
    FIRST: gl.constexpr = SPEC.VALUE_BLOCK * INDEX
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    C: gl.constexpr = value_chunks(WIDTH, BLOCK)
    words = _load_plane(
        tile, SPEC.VALUES_AT + FIRST * WIDTH // 8, C[0], C[1], SPEC.D * WIDTH // 8, False, 1, SPEC
    )
    planes = (_joined(words, C[0], SPEC),)
    if BITS == 3:
        SIGNS: gl.constexpr = SPEC.VALUES_AT + SPEC.D * WIDTH // 2 + FIRST // 8
        words = _load_plane(tile, SIGNS, 1, BLOCK // 64, SPEC.D // 8, False, 1, SPEC)
        planes = planes + (_joined(words, 1, SPEC),)
    return planes


@gluon.jit
def _joined(words, C: gl.constexpr, SPEC: gl.constexpr):
    """Words [W, P, C, 32] -> [W, P, C, 32, len(words)]."""
    if len(words) == 1:
        return gl.reshape(words[0], [SPEC.W, SPEC.P, C, 32, 1])
    elif len(words) == 2:
        return gl.join(words[0], words[1])
    else:
        x = gl.join(gl.join(words[0], words[2]), gl.join(words[1], words[3]))
        return gl.reshape(x, [SPEC.W, SPEC.P, C, 32, 4])


@gluon.jit
def load_scales(tile, L: gl.constexpr, SPEC: gl.constexpr):
    """Key and value scales of a tile's tokens: two float32 [W, 16 P, 1] in layout L's slice."""
    S: gl.constexpr = _scale_layout(SPEC.W, SPEC.P)
    r = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, S))))[None, None, None, :]
    n0 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, S))))[None, None, :, None]
    page = gl.arange(0, SPEC.P, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, S))))[
        None, :, None, None
    ]
    at = (_of_warp(tile, SPEC.W, S) + r * 4) + (page * (SPEC.PAGE_WORDS * 4) + n0 * 32) + SPEC.SCALES_AT * 4
    key_scale, value_scale = gl.inline_asm_elementwise(
        _SCALES, "=f,=f,r", [at], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )
    return _of_tokens(key_scale, L, SPEC), _of_tokens(value_scale, L, SPEC)


@gluon.jit
def _of_tokens(x, L: gl.constexpr, SPEC: gl.constexpr):
    """[W, P, 2, 8] -> [W, 16 P, 1]."""
    x = gl.reshape(x, [SPEC.W, SPEC.P * 16])
    return gl.convert_layout(x, gl.SliceLayout(2, L), assert_trivial=True)[:, :, None]
