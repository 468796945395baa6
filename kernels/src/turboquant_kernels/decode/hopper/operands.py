"""Operands of integer tensor cores: those that `fragments` makes of packed keys, and queries.

Every warp has its own pages; a tensor's first two dimensions are [warps, pages of a warp]. Lane 4 r + t of
a warp stands in row r and column group t of `mma.m16n8k32`'s operands. Each conversion of a layout here is
free: it only renames what a register holds (`assert_trivial`), so nothing passes through shared memory.

    words of a plane  [W, P, chunks, 32]             as `ring` loads them, a tensor a word
    bytes of words    [W, P, 32, words, 4]           the last dimension is a register
    operand           [W, rows, contraction]         by reshapes and permutations of the above
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOVE = gl.constexpr("mov.b32 $0, $1;")
_ADDRESS = gl.constexpr("{ .reg .b32 b; mov.b32 b, global_smem; add.s32 $0, b, $1; }")


@gluon.constexpr_function
def blocks_of(head_dim, largest):
    """Pieces of a vector that are read at once: `largest` coordinates, the last one maybe fewer.

    Of 80 and 96 the last one is rounded up to a power of two, at least 32: what stands in place of
    coordinates that a vector does not have meets zeros of a query, or is not stored.
    """
    return tuple(
        min(largest, max(32, 1 << (head_dim - first - 1).bit_length()))
        for first in range(0, head_dim, largest)
    )


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


@gluon.jit
def shared_address(at):
    """Addresses of bytes of the program's shared memory, int32."""
    return gl.inline_asm_elementwise(_ADDRESS, "=r,r", [at], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_words(address, WORDS: gl.constexpr, AT_ONCE: gl.constexpr):
    """The WORDS words at shared addresses [...]: a tuple of int32 tensors [...]. It waits for no store.

    AT_ONCE of them, 1, 2 or 4, are one load, whose address is a multiple of its size.
    """
    if WORDS > AT_ONCE:
        return load_words(address, AT_ONCE, AT_ONCE) + load_words(
            address + 4 * AT_ONCE, WORDS - AT_ONCE, AT_ONCE
        )
    elif WORDS == 1:
        a = gl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
        )
        return (a,)
    elif WORDS == 2:
        a, b = gl.inline_asm_elementwise(
            "ld.shared.v2.b32 {$0, $1}, [$2];",
            "=r,=r,r",
            [address],
            dtype=(gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
        return (a, b)
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r",
            [address],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
        return (a, b, c, d)


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
def join8(o):
    """Eight tensors [...] -> [..., 2, 2, 2], the lowest bit of the index first."""
    low = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
    high = gl.join(gl.join(o[4], o[5]), gl.join(o[6], o[7]))
    return gl.join(low, high)


@gluon.jit
def key_operand(
    words,
    registers,
    W: gl.constexpr,
    P: gl.constexpr,
    BITS: gl.constexpr,
    BLOCK: gl.constexpr,
    INDEX: gl.constexpr,
    ASM: gl.constexpr,
    A: gl.constexpr,
):
    """A lane's words of packed keys, as `ring.load_keys` gives them -> int8 [W, 16 P tokens, BLOCK]."""
    WIDTH: gl.constexpr = 8 if BITS == 8 else (2 if BITS < 4 else 4)
    inputs = ()
    for i in gl.static_range(len(words)):
        word = gl.permute(words[i], [0, 1, 3, 2])
        if i * 128 >= BLOCK * WIDTH and BLOCK == 64:
            # Two lanes share a word of a one-bit plane; the second one's bits stand above the first one's.
            lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, word.type.layout))))
            word = word >> ((lane % 2) * (2 if BITS == 3 else 4))[None, None, :, None]
        inputs = inputs + (bytes_of_words(word, W, P, 2),)
    inputs = inputs + spread(registers, W, P, 2)
    if BITS == 8:
        o = ()
        for i in gl.static_range(len(words)):
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
def _load_queries(
    queries,
    q_row,
    seen,
    BITS: gl.constexpr,
    BLOCK: gl.constexpr,
    LEFT: gl.constexpr,
    B: gl.constexpr,
):
    """Rotated queries of a block of coordinates, of which there are LEFT, in the order of the key operand:
    int8 [W, BLOCK, 2 R]."""
    k = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, B)))[None, :, None]
    register = k // 16
    byte = k % 4
    if BITS == 2 or BITS == 3:
        within = 16 * (register // 4) + 8 * (register // 2 % 2) + 2 * byte + register % 2
    else:
        within = 4 * register + byte
    coordinate = (k // 4 % 4) * (BLOCK // 4) + within
    # Where the second condition always holds, it gives the mask the shape of what is loaded.
    there = coordinate < LEFT if LEFT < BLOCK else coordinate >= 0
    return gl.load(queries + q_row + coordinate, mask=seen & there, other=0)


@gluon.constexpr_function
def _query_layout(warps, chunks):
    """[1, chunks, 32, 16] bytes, a lane's 16 adjacent, which every warp holds."""
    registers = basis(3, 16, 4) + basis(1, chunks, 4)
    copies = [[0] * 4 for _ in basis(0, warps, 4)]
    return gl.DistributedLinearLayout(registers, basis(2, 32, 4), copies, [], [1, chunks, 32, 16])


@gluon.constexpr_function
def _query_word_layout(warps, chunks):
    """[warps, chunks, 32 lanes, 4 words, 4 bytes]."""
    registers = basis(4, 4, 5) + basis(3, 4, 5) + basis(1, chunks, 5)
    return gl.DistributedLinearLayout(
        registers, basis(2, 32, 5), basis(0, warps, 5), [], [warps, chunks, 32, 4, 4]
    )


@gluon.jit
def _share_queries(memory, q, W: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr):
    """Puts the operand of a block, int8 [1, BLOCK, N], into shared memory of as many bytes.

    For kernels that need its registers for other things: each warp reads it again for each tile, 16 bytes a
    lane, by `load_shared_queries`, which does not wait for this store.
    """
    CHUNKS: gl.constexpr = BLOCK * N // 512
    q = gl.reshape(q, [1, BLOCK // 16, 4, 4, N // 8, 8])  # register, t, byte, tile, r
    q = gl.permute(q, [0, 4, 1, 5, 2, 3])
    q = gl.reshape(gl.permute(gl.reshape(q, [1, CHUNKS, 4, 32, 4]), [0, 1, 3, 2, 4]), [1, CHUNKS, 32, 16])
    q = gl.convert_layout(q, _query_layout(W, CHUNKS), assert_trivial=True)
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    memory._reinterpret(gl.int8, [1, CHUNKS, 32, 16], layout).store(q)


@gluon.jit
def load_operands(
    queries,
    memory,
    ROWS_BEFORE: gl.constexpr,
    first_token,
    first_row,
    total_rows,
    first_head,
    q_heads: gl.constexpr,
    G: gl.constexpr,
    W: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
    SHARED: gl.constexpr,
    B: gl.constexpr,
):
    """Queries, int8 [tokens, q_heads, 2, D], as operands: int8 [W, coordinates, 2 R] for each block of
    coordinates, whose column 2 r is the high half of row r. With SHARED they go to rows of shared memory from
    ROWS_BEFORE on instead."""
    BLOCKS: gl.constexpr = blocks_of(D, 128)
    column = gl.arange(0, 2 * R, gl.SliceLayout(0, gl.SliceLayout(1, B)))[None, None, :]
    row = first_row + column // 2
    token = first_token + row // G
    query_head = first_head + row % G
    q_row = ((token * q_heads + query_head) * 2 + column % 2) * D
    # Zeros that give a tensor its dimension of warps, each of which holds a copy.
    no_warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))[:, None, None] * 0
    q = ()
    used = row < total_rows
    for i in gl.static_range(len(BLOCKS)):
        if SHARED:
            part = _load_queries(queries + i * 128, q_row, used, BITS, BLOCKS[i], D - i * 128, B)
            _share_queries(memory.index(ROWS_BEFORE + i), part, W, 2 * R, BLOCKS[i])
        else:
            of_warp = used & (no_warp == 0)
            at = queries + i * 128
            q = q + (_load_queries(at, q_row + no_warp, of_warp, BITS, BLOCKS[i], D - i * 128, B),)
    if SHARED:
        gl.thread_barrier()
    return q


@gluon.jit
def load_shared_queries(
    AT: gl.constexpr, W: gl.constexpr, N: gl.constexpr, BLOCK: gl.constexpr, B: gl.constexpr
):
    """The operand that `_share_queries` put at byte AT of shared memory: int8 [W, BLOCK, N]."""
    CHUNKS: gl.constexpr = BLOCK * N // 512
    Q: gl.constexpr = _query_word_layout(W, CHUNKS)
    L: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, Q))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    no_warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None] * 0
    a, b, c, d = load_words(shared_address(lane * 16 + no_warp) + (chunk * 512 + AT), 4, 4)
    x = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [W, CHUNKS, 32, 4])
    x = gl.convert_layout(x, gl.SliceLayout(4, Q), assert_trivial=True)
    x, _ = gl.broadcast(x[:, :, :, :, None], gl.full([W, CHUNKS, 32, 4, 4], 0, gl.int32, Q))
    q = gl.inline_asm_elementwise(MOVE, "=r,r,r,r,r", [x], dtype=gl.int8, is_pure=True, pack=4)
    q = gl.permute(gl.reshape(q, [W, CHUNKS, 32, 4, 4]), [0, 1, 3, 2, 4])
    q = gl.reshape(q, [W, N // 8, BLOCK // 16, 8, 4, 4])
    q = gl.reshape(gl.permute(q, [0, 2, 4, 5, 1, 3]), [W, BLOCK, N])
    return gl.convert_layout(q, B, assert_trivial=True)
