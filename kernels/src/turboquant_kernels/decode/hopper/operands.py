"""Operands of integer tensor cores: how words become them, and those of packed keys.

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
def product_layout(warps):
    """Of what tensor cores add up: each warp has its own matrices of `mma.m16n8k32`."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def operand_layout(warps, index):
    """Of the first or second int8 operand, index 0 or 1."""
    return gl.DotOperandLayout(index, product_layout(warps), 4)


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
def load_table(pointer, COUNT: gl.constexpr, SPEC: gl.constexpr):
    """Words of a table of COUNT. Each lane reads its own copy: a word that the compiler knows to be equal
    in all lanes it keeps in a uniform register and moves at each use."""
    lane = gl.arange(0, 32, _lane_layout(SPEC.W, SPEC.P, 1))
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
def key_operand(words, registers, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """A lane's words of packed keys of a block, as `ring.load_keys` gives them -> int8 [W, 16 P tokens,
    coordinates]."""
    BLOCK: gl.constexpr = SPEC.KEY_BLOCKS[INDEX]
    WIDTH: gl.constexpr = 8 if SPEC.KEY_BITS == 8 else (2 if SPEC.KEY_BITS < 4 else 4)
    inputs = ()
    for i in gl.static_range(len(words)):
        word = gl.permute(words[i], [0, 1, 3, 2])
        if i * 128 >= BLOCK * WIDTH and BLOCK == 64:
            # Two lanes share a word of a one-bit plane; the second one's bits stand above the first one's.
            lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, word.type.layout))))
            word = word >> ((lane % 2) * (2 if SPEC.KEY_BITS == 3 else 4))[None, None, :, None]
        inputs = inputs + (bytes_of_words(word, SPEC.W, SPEC.P, 2),)
    inputs = inputs + spread(registers, SPEC.W, SPEC.P, 2)
    if SPEC.KEY_BITS == 8:
        o = ()
        for i in gl.static_range(len(words)):
            o = o + (
                gl.inline_asm_elementwise(
                    MOVE, "=r,r,r,r,r", [inputs[i]], dtype=gl.int8, is_pure=True, pack=4
                ),
            )
    elif BLOCK == 128:
        o = gl.inline_asm_elementwise(
            SPEC.KEY_ASM[INDEX][0],
            SPEC.KEY_ASM[INDEX][1],
            inputs,
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        )
    else:
        o = gl.inline_asm_elementwise(
            SPEC.KEY_ASM[INDEX][0],
            SPEC.KEY_ASM[INDEX][1],
            inputs,
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        )
    if BLOCK == 128:
        y = gl.reshape(
            join8(o), [SPEC.W, SPEC.P, 8, 4, 2, 4, 2, 2, 2]
        )  # page, r, t, n0, byte, register (3 bits)
        y = gl.permute(y, [0, 1, 4, 2, 8, 7, 6, 3, 5])  # page n0 r | register t byte
    else:
        y = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
        y = gl.permute(gl.reshape(y, [SPEC.W, SPEC.P, 8, 4, 2, 4, 2, 2]), [0, 1, 4, 2, 7, 6, 3, 5])
    y = gl.reshape(y, [SPEC.W, SPEC.P * 16, BLOCK])
    return gl.convert_layout(y, operand_layout(SPEC.W, 0), assert_trivial=True)
