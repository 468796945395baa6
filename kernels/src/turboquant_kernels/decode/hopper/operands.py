"""Loads of packed codes, and the operands of integer tensor cores that `fragments` makes of keys and queries.

Every warp has its own pages; a tensor's first two dimensions are [warps, pages of a warp]. Lane 4 r + t of
a warp stands in row r and column group t of `mma.m16n8k32`'s operands. Each conversion of a layout here is
free: it only renames what a register holds (`assert_trivial`), so nothing passes through shared memory.

    words of a plane  [W, P, chunks, 32 * words]     as loaded: a lane's words are adjacent, up to 16 bytes
    bytes of words    [W, P, 32, words, 4]           the last dimension is a register
    operand           [W, rows, contraction]         by reshapes and permutations of the above
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOVE = gl.constexpr("mov.b32 $0, $1;")


@gluon.constexpr_function
def blocks_of(head_dim, largest):
    """Pieces of a vector that are read at once: `largest` coordinates, the last one maybe fewer."""
    return tuple(min(largest, head_dim - first) for first in range(0, head_dim, largest))


@gluon.constexpr_function
def item_of(items, *index):
    """items[i][j]...: subscripts of a constexpr tuple lose that they are constexpr."""
    for i in index:
        items = items[i]
    return items


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def basis(position, n, rank):
    """Basis vectors of a dimension: 1, 2, 4, ... n / 2 at `position` of `rank`."""
    return [[1 << i if p == position else 0 for p in range(rank)] for i in range(_log2(n))]


@gluon.constexpr_function
def _load_layout(warps, pages, chunks, words):
    """[warps, pages, chunks, 32 * words]: lane by lane `words` neighbours."""
    registers = basis(3, words, 4) + basis(2, chunks, 4) + basis(1, pages, 4)
    lanes = [[0, 0, 0, words << i] for i in range(5)]
    return gl.DistributedLinearLayout(
        registers, lanes, basis(0, warps, 4), [], [warps, pages, chunks, 32 * words]
    )


@gluon.constexpr_function
def _byte_layout(warps, pages, chunks):
    """[warps, pages, 32 lanes, chunks, 4]: four bytes, the last dimension, are one register."""
    registers = basis(4, 4, 5) + basis(3, chunks, 5) + basis(1, pages, 5)
    return gl.DistributedLinearLayout(
        registers, basis(2, 32, 5), basis(0, warps, 5), [], [warps, pages, 32, chunks, 4]
    )


@gluon.constexpr_function
def _lane_layout(W, P, CHUNKS):
    """[32], of which each lane holds its own, as `_byte_layout` has it."""
    L = _byte_layout(W, P, CHUNKS)
    return gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, L))))


@gluon.jit
def bytes_of_words(x, W: gl.constexpr, PAGES: gl.constexpr, CHUNKS: gl.constexpr):
    """[W, PAGES, 32, CHUNKS] int32 -> the same word four times: [W, PAGES, 32, CHUNKS, 4]."""
    L: gl.constexpr = _byte_layout(W, PAGES, CHUNKS)
    x = gl.convert_layout(x, gl.SliceLayout(4, L), assert_trivial=True)
    y, _ = gl.broadcast(x[:, :, :, :, None], gl.full([W, PAGES, 32, CHUNKS, 4], 0, gl.int32, L))
    return y


@gluon.jit
def load_table(pointer, COUNT: gl.constexpr, W: gl.constexpr, P: gl.constexpr):
    """Words of a table of COUNT. Each lane reads its own copy: a word that the compiler knows to be equal
    in all lanes it keeps in a uniform register and moves at each use."""
    lane = gl.arange(0, 32, _lane_layout(W, P, 1))
    registers = ()
    for i in gl.static_range(COUNT):
        registers = registers + (gl.load(pointer + 32 * i + lane),)
    return registers


@gluon.jit
def spread(registers, W: gl.constexpr, P: gl.constexpr, CHUNKS: gl.constexpr):
    """Each lane's word for every element of [W, P, 32, CHUNKS, 4]."""
    zero = gl.full([W, P, 32, CHUNKS, 4], 0, gl.int32, _byte_layout(W, P, CHUNKS))
    spread = ()
    for i in gl.static_range(len(registers)):
        word = gl.convert_layout(registers[i], _lane_layout(W, P, CHUNKS), assert_trivial=True)
        word, _ = gl.broadcast(word[None, None, :, None, None], zero)
        spread = spread + (word,)
    return spread


@gluon.jit
def _split_words(x, W: gl.constexpr, PAGES: gl.constexpr, CHUNKS: gl.constexpr, WORDS: gl.constexpr):
    """Loaded words [W, PAGES, CHUNKS, 32 * WORDS] -> a tuple of WORDS tensors [W, PAGES, 32, CHUNKS]."""
    x = gl.permute(gl.reshape(x, [W, PAGES, CHUNKS, 32, WORDS]), [0, 1, 3, 2, 4])
    return _unpack(x, W, PAGES, CHUNKS, WORDS)


@gluon.jit
def _unpack(x, W: gl.constexpr, PAGES: gl.constexpr, CHUNKS: gl.constexpr, N: gl.constexpr):
    """[W, PAGES, 32, CHUNKS, N] -> a tuple of N tensors [W, PAGES, 32, CHUNKS]."""
    if N == 1:
        return (gl.reshape(x, [W, PAGES, 32, CHUNKS]),)
    elif N == 2:
        a, b = gl.split(x)
        return (a, b)
    elif N == 4:
        even, odd = gl.split(gl.reshape(x, [W, PAGES, 32, CHUNKS, 2, 2]))
        a, c = gl.split(even)
        b, d = gl.split(odd)
        return (a, b, c, d)
    else:
        even, odd = gl.split(gl.reshape(x, [W, PAGES, 32, CHUNKS, 4, 2]))
        a, c, e, g = _unpack(even, W, PAGES, CHUNKS, 4)
        b, d, f, h = _unpack(odd, W, PAGES, CHUNKS, 4)
        return (a, b, c, d, e, f, g, h)


@gluon.jit
def join8(o):
    """Eight tensors [...] -> [..., 2, 2, 2], the lowest bit of the index first."""
    low = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
    high = gl.join(gl.join(o[4], o[5]), gl.join(o[6], o[7]))
    return gl.join(low, high)


@gluon.jit
def load_plane(
    base,
    offset,
    W: gl.constexpr,
    P: gl.constexpr,
    CHUNKS: gl.constexpr,
    WORDS: gl.constexpr,
    KEYS: gl.constexpr,
    ROW: gl.constexpr,
    SHARED: gl.constexpr,
):
    """Words of a plane whose rows are ROW words apart: [W, P, CHUNKS, 32 * WORDS].

    Lane 4 r + t reads WORDS words a chunk. KEYS: a row is a token's; chunk n0 is token 8 n0 + r, of which
    the lane reads quarter t; SHARED lanes read the same words. Else a row is that of four tokens; the lane
    reads row t, of each chunk eighth r.
    """
    L: gl.constexpr = _load_layout(W, P, CHUNKS, WORDS)
    e = gl.arange(0, 32 * WORDS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[
        None, None, None, :
    ]
    c = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    lane = e // WORDS
    if KEYS:
        within = (lane // 4 + 8 * c) * ROW + lane % 4 // SHARED * WORDS + e % WORDS
    else:
        within = lane % 4 * ROW + (8 * c + lane // 4) * WORDS + e % WORDS
    page = gl.convert_layout(offset, gl.SliceLayout(2, gl.SliceLayout(3, L)), assert_trivial=True)
    return gl.load((base + within) + page[:, :, None, None])


@gluon.jit
def load_keys(
    base,
    offset,
    W: gl.constexpr,
    P: gl.constexpr,
    BITS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    FIRST: gl.constexpr,
):
    """Packed keys of coordinates FIRST .. FIRST + BLOCK of P pages a warp: one tensor a plane."""
    WIDTH: gl.constexpr = 8 if BITS == 8 else (2 if BITS < 4 else 4)
    WORDS: gl.constexpr = BLOCK * WIDTH // 128
    planes = (load_plane(base + FIRST * WIDTH // 32, offset, W, P, 2, WORDS, True, D * WIDTH // 32, 1),)
    if BITS == 3 or BITS == 5 or BITS == 6:
        at = D * WIDTH // 2 + FIRST // 32
        planes = planes + (load_plane(base + at, offset, W, P, 2, 1, True, D // 32, 128 // BLOCK),)
        if BITS == 6:
            planes = planes + (
                load_plane(base + at + D // 2, offset, W, P, 2, 1, True, D // 32, 128 // BLOCK),
            )
    return planes


@gluon.jit
def key_operand(
    planes,
    registers,
    W: gl.constexpr,
    P: gl.constexpr,
    BITS: gl.constexpr,
    BLOCK: gl.constexpr,
    INDEX: gl.constexpr,
    ASM: gl.constexpr,
    A: gl.constexpr,
):
    """Packed keys -> int8 [W, 16 P tokens, BLOCK]."""
    WIDTH: gl.constexpr = 8 if BITS == 8 else (2 if BITS < 4 else 4)
    WORDS: gl.constexpr = BLOCK * WIDTH // 128
    words = _split_words(planes[0], W, P, 2, WORDS)
    if BITS == 3 or BITS == 5 or BITS == 6:
        for i in gl.static_range(1, len(planes)):
            words = words + _split_words(planes[i], W, P, 2, 1)
    inputs = ()
    for i in gl.static_range(len(words)):
        word = words[i]
        if i * 128 >= BLOCK * WIDTH and BLOCK == 64:
            # Two lanes share a word of a one-bit plane; the second one's bits stand above the first one's.
            lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, word.type.layout))))
            word = word >> ((lane % 2) * (2 if BITS == 3 else 4))[None, None, :, None]
        inputs = inputs + (bytes_of_words(word, W, P, 2),)
    inputs = inputs + spread(registers, W, P, 2)
    if BITS == 8:
        o = ()
        for i in gl.static_range(WORDS):
            o = o + (
                gl.inline_asm_elementwise(
                    MOVE, "=r,r,r,r,r", [inputs[i]], dtype=gl.int8, is_pure=True, pack=4
                ),
            )
    elif BLOCK == 128:
        o = gl.inline_asm_elementwise(
            item_of(ASM, INDEX, 0),
            item_of(ASM, INDEX, 1),
            inputs,
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        )
    else:
        o = gl.inline_asm_elementwise(
            item_of(ASM, INDEX, 0),
            item_of(ASM, INDEX, 1),
            inputs,
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        )
    if BLOCK == 128:
        y = gl.reshape(join8(o), [W, P, 8, 4, 2, 4, 2, 2, 2])  # page, r, t, n0, byte, register (3 bits)
        y = gl.permute(y, [0, 1, 4, 2, 8, 7, 6, 3, 5])  # page n0 r | register t byte
    else:
        y = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
        y = gl.permute(gl.reshape(y, [W, P, 8, 4, 2, 4, 2, 2]), [0, 1, 4, 2, 7, 6, 3, 5])
    return gl.convert_layout(gl.reshape(y, [W, P * 16, BLOCK]), A, assert_trivial=True)


@gluon.jit
def load_queries(
    queries,
    q_row,
    seen,
    BITS: gl.constexpr,
    BLOCK: gl.constexpr,
    B: gl.constexpr,
):
    """Rotated queries of a block of coordinates, in the order of the key operand: int8 [W, BLOCK, 2 R]."""
    k = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    register = k // 16
    byte = k % 4
    if BITS == 2 or BITS == 3:
        within = 16 * (register // 4) + 8 * (register // 2 % 2) + 2 * byte + register % 2
    else:
        within = 4 * register + byte
    coordinate = (k // 4 % 4) * (BLOCK // 4) + within
    # The second condition always holds: it gives the mask the shape of what is loaded.
    return gl.load(queries + q_row + coordinate, mask=seen & (coordinate >= 0), other=0)


@gluon.constexpr_function
def _query_layout(warps, chunks):
    """[warps, chunks, 32, 16] bytes: a lane's 16 are adjacent."""
    registers = basis(3, 16, 4) + basis(1, chunks, 4)
    return gl.DistributedLinearLayout(
        registers, basis(2, 32, 4), basis(0, warps, 4), [], [warps, chunks, 32, 16]
    )


@gluon.jit
def share_queries(q, W: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr):
    """Puts the operand of a block, int8 [W, BLOCK, N], into shared memory, a copy for each warp.

    For kernels that need its registers for other things: read again for each tile, 16 bytes a lane.
    """
    CHUNKS: gl.constexpr = BLOCK * N // 512
    q = gl.reshape(q, [W, BLOCK // 16, 4, 4, N // 8, 8])  # register, t, byte, tile, r
    q = gl.permute(q, [0, 4, 1, 5, 2, 3])
    q = gl.reshape(gl.permute(gl.reshape(q, [W, CHUNKS, 4, 32, 4]), [0, 1, 3, 2, 4]), [W, CHUNKS, 32, 16])
    q = gl.convert_layout(q, _query_layout(W, CHUNKS), assert_trivial=True)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    return gl.allocate_shared_memory(gl.int8, [W, CHUNKS, 32, 16], layout, q)


@gluon.jit
def load_shared_queries(shared, W: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, B: gl.constexpr):
    """The operand that `share_queries` put away: int8 [W, BLOCK, N]."""
    CHUNKS: gl.constexpr = BLOCK * N // 512
    q = shared.load(_query_layout(W, CHUNKS))
    q = gl.permute(gl.reshape(q, [W, CHUNKS, 32, 4, 4]), [0, 1, 3, 2, 4])
    q = gl.reshape(q, [W, N // 8, BLOCK // 16, 8, 4, 4])
    q = gl.reshape(gl.permute(q, [0, 2, 4, 5, 1, 3]), [W, BLOCK, N])
    return gl.convert_layout(q, B, assert_trivial=True)
