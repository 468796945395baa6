"""Rows of a program: query heads of its KV head, times query tokens; and their queries as operands."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from turboquant_kernels.decode.hopper.operands import (
    MOVE,
    basis,
    load_words,
    operand_layout,
    shared_address,
)


class Rows(NamedTuple):
    """Which rows of a KV head a program has: R from `first` on. With G query heads a KV head, row i * G + g
    is query head g of query token i."""

    first: Any
    total: Any
    """Rows of the KV head."""
    token: Any
    """The sequence's first query token, in the batch."""
    query_head: Any
    """The KV head's first query head."""


class Queries(NamedTuple):
    """What logits are made of, of R rows. Each warp has a copy."""

    operands: tuple[Any, ...]
    """Of each block of coordinates int8 [W, coordinates, 2 R], whose column 2 r is the high half of row r;
    none where they stand in shared memory."""
    scale: Any
    """float32 [W, R]: what their integer products count."""
    half_sum: Any
    """float32 [W, R]: half the sum of a row's coordinates, in what these count."""
    position: Any
    """int32 [W, R]: the position of a row's query."""


@gluon.jit
def query_index(rows, row, SPEC: gl.constexpr):
    """Where a row's query stands among [tokens, query heads]."""
    return (
        (rows.token + row // SPEC.GROUP) * (SPEC.KV_HEADS * SPEC.GROUP) + rows.query_head + row % SPEC.GROUP
    )


@gluon.jit
def load_queries(codes, scale, half_sum, rows, before, memory, L: gl.constexpr, SPEC: gl.constexpr):
    """`Queries` of a program's rows, in a slice of layout L: int8 `codes` [tokens, q_heads, 2, D], float32
    `scale` and `half_sum` [tokens, q_heads]. Query token i stands at position `before` + i.

    With SHARED_QUERIES operands go to the rows of shared memory behind the ring.
    """
    operands = _load_operands(codes, rows, memory, SPEC)
    row = rows.first + gl.arange(0, SPEC.R, gl.SliceLayout(0, L))
    # Zeros that give a tensor its dimension of warps, each of which holds a copy.
    no_warp = (gl.arange(0, SPEC.W, gl.SliceLayout(1, L)) * 0)[:, None]
    there = (row < rows.total)[None, :] & (no_warp == 0)
    at = query_index(rows, row, SPEC)[None, :] + no_warp
    row_scale = gl.load(scale + at, mask=there, other=0.0)
    row_half_sum = gl.load(half_sum + at, mask=there, other=0.0) * row_scale
    position = (before + row // SPEC.GROUP)[None, :] + no_warp
    return Queries(operands, row_scale, row_half_sum, position)


@gluon.jit
def _load_operands(codes, rows, memory, SPEC: gl.constexpr):
    B: gl.constexpr = operand_layout(SPEC.W, 1)
    column = gl.arange(0, 2 * SPEC.R, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    row = rows.first + column // 2
    at = (query_index(rows, row, SPEC) * 2 + column % 2) * SPEC.D
    no_warp = gl.arange(0, SPEC.W, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 0
    operands = ()
    used = row < rows.total
    for i in gl.static_range(len(SPEC.KEY_BLOCKS)):
        if SPEC.SHARED_QUERIES:
            part = _load_operand(codes + i * 128, at, used, i, SPEC)
            _share_operand(memory.index(SPEC.RING_ROWS + i), part, SPEC.KEY_BLOCKS[i], SPEC)
        else:
            of_warp = used & (no_warp == 0)
            operands = operands + (_load_operand(codes + i * 128, at + no_warp, of_warp, i, SPEC),)
    if SPEC.SHARED_QUERIES:
        gl.barrier()
    return operands


@gluon.jit
def _load_operand(codes, at, seen, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """Queries of a block, in the order of the key operand: int8 [W or 1, coordinates, 2 R]."""
    BLOCK: gl.constexpr = SPEC.KEY_BLOCKS[INDEX]
    LEFT: gl.constexpr = SPEC.D - 128 * INDEX
    k = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, operand_layout(SPEC.W, 1))))[None, :, None]
    register = k // 16
    byte = k % 4
    if SPEC.KEY_BITS == 2 or SPEC.KEY_BITS == 3:
        within = 16 * (register // 4) + 8 * (register // 2 % 2) + 2 * byte + register % 2
    else:
        within = 4 * register + byte
    coordinate = (k // 4 % 4) * (BLOCK // 4) + within
    # Where the second condition always holds, it gives the mask the shape of what is loaded.
    there = coordinate < LEFT if LEFT < BLOCK else coordinate >= 0
    return gl.load(codes + at + coordinate, mask=seen & there, other=0)


@gluon.constexpr_function
def _share_layout(warps, chunks):
    """[1, chunks, 32, 16] bytes, a lane's 16 adjacent, which every warp holds."""
    registers = basis(3, 16, 4) + basis(1, chunks, 4)
    copies = [[0] * 4 for _ in basis(0, warps, 4)]
    return gl.DistributedLinearLayout(registers, basis(2, 32, 4), copies, [], [1, chunks, 32, 16])


@gluon.constexpr_function
def _shared_word_layout(warps, chunks):
    """[warps, chunks, 32 lanes, 4 words, 4 bytes]."""
    registers = basis(4, 4, 5) + basis(3, 4, 5) + basis(1, chunks, 5)
    return gl.DistributedLinearLayout(
        registers, basis(2, 32, 5), basis(0, warps, 5), [], [warps, chunks, 32, 4, 4]
    )


@gluon.jit
def _share_operand(memory, q, BLOCK: gl.constexpr, SPEC: gl.constexpr):
    """Puts the operand of a block, int8 [1, BLOCK, 2 R], into shared memory of as many bytes.

    For kernels that need its registers for other things: each warp reads it again for each tile, 16 bytes a
    lane, by `_shared_operand`, which does not wait for this store.
    """
    N: gl.constexpr = 2 * SPEC.R
    CHUNKS: gl.constexpr = BLOCK * N // 512
    q = gl.reshape(q, [1, BLOCK // 16, 4, 4, N // 8, 8])  # register, t, byte, tile, r
    q = gl.permute(q, [0, 4, 1, 5, 2, 3])
    q = gl.reshape(gl.permute(gl.reshape(q, [1, CHUNKS, 4, 32, 4]), [0, 1, 3, 2, 4]), [1, CHUNKS, 32, 16])
    q = gl.convert_layout(q, _share_layout(SPEC.W, CHUNKS), assert_trivial=True)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    memory._reinterpret(gl.int8, [1, CHUNKS, 32, 16], layout).store(q)


@gluon.jit
def query_operand(queries, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """The operand of a block of coordinates: int8 [W, coordinates, 2 R]."""
    if SPEC.SHARED_QUERIES:
        q = _shared_operand((SPEC.RING_ROWS + INDEX) * (256 * SPEC.R), SPEC.KEY_BLOCKS[INDEX], SPEC)
    else:
        q = queries.operands[INDEX]
    return q


@gluon.jit
def _shared_operand(AT: gl.constexpr, BLOCK: gl.constexpr, SPEC: gl.constexpr):
    """The operand that `_share_operand` put at byte AT of shared memory: int8 [W, BLOCK, 2 R]."""
    N: gl.constexpr = 2 * SPEC.R
    CHUNKS: gl.constexpr = BLOCK * N // 512
    Q: gl.constexpr = _shared_word_layout(SPEC.W, CHUNKS)
    L: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, Q))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    no_warp = gl.arange(0, SPEC.W, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None] * 0
    a, b, c, d = load_words(shared_address(lane * 16 + no_warp) + (chunk * 512 + AT), 4, 4)
    x = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [SPEC.W, CHUNKS, 32, 4])
    x = gl.convert_layout(x, gl.SliceLayout(4, Q), assert_trivial=True)
    x, _ = gl.broadcast(x[:, :, :, :, None], gl.full([SPEC.W, CHUNKS, 32, 4, 4], 0, gl.int32, Q))
    q = gl.inline_asm_elementwise(MOVE, "=r,r,r,r,r", [x], dtype=gl.int8, is_pure=True, pack=4)
    q = gl.permute(gl.reshape(q, [SPEC.W, CHUNKS, 32, 4, 4]), [0, 1, 3, 2, 4])
    q = gl.reshape(q, [SPEC.W, N // 8, BLOCK // 16, 8, 4, 4])
    q = gl.reshape(gl.permute(q, [0, 2, 4, 5, 1, 3]), [SPEC.W, BLOCK, N])
    return gl.convert_layout(q, operand_layout(SPEC.W, 1), assert_trivial=True)
