"""Values and weights of the Hopper kernel: packed values to operands, and their products with the weights.

Coordinates are rows, tokens are contracted. At 2 to 4 bits a register of values holds two coordinates of
two tokens (`fragments`), so the weights come twice, with a zero after and before each, and every product
gives half of the coordinates: one `part` of a block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.hopper import launch
from turboquant_kernels.decode.hopper.operands import (
    MOVE,
    bytes_of_words,
    join8,
    operand_layout,
    product_layout,
    spread,
)

WEIGHT_ONE = gl.constexpr(float(launch.WEIGHT_ONE))

_MAGIC = gl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 above it holds an integer in its low bits."""
_MAGIC_BITS = gl.constexpr(0x4B400000)
_MAGIC_HIGH = gl.constexpr(3221225472.0)
"""1.5 * 2**31: a float32 above it holds a multiple of 256 in its low bits."""
_MAGIC_HIGH_BITS = gl.constexpr(0x4F400000)
# Two tokens' fixed-point weights of one row -> their high and low bytes as two 16-bit elements, transposed
# across the warp so that lanes hold tokens where they held rows. The low byte is made signed.
_TRANSPOSED = gl.constexpr(
    "{ .reg .b32 y; prmt.b32 y, $1, $2, 0x4051; xor.b32 y, y, 0x80800000;"
    " movmatrix.sync.aligned.m8n8.trans.b16 $0, y; }"
)
# Four tokens' weights -> two registers of two, with a zero after, and before, each.
_LOW_WEIGHTS = gl.constexpr("{ prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342; }")
_HIGH_WEIGHTS = gl.constexpr("{ prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424; }")


@gluon.constexpr_function
def value_chunks(bits, block):
    """Loads of up to 16 bytes a lane in which a block of coordinates is read: chunks, words a chunk."""
    words = block * bits // 64
    return (max(1, words // 4), min(4, words))


@gluon.jit
def value_operand(planes, registers, INDEX: gl.constexpr, SPEC: gl.constexpr):
    """Packed values of a block, as `ring.load_values` gives them -> the operand whose contraction index are
    tokens.

    8 bits: int8 [W, BLOCK coordinates, 16 P tokens]. Else int8 [W, BLOCK / 2 pairs of coordinates, 32 P]:
    of every two tokens (first: low, high; second: low, high).
    """
    W: gl.constexpr = SPEC.W
    P: gl.constexpr = SPEC.P
    BITS: gl.constexpr = SPEC.VALUE_BITS
    BLOCK: gl.constexpr = SPEC.VALUE_BLOCKS[INDEX]
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    C: gl.constexpr = value_chunks(WIDTH, BLOCK)
    WORDS: gl.constexpr = C[0] * C[1]
    x = gl.permute(planes[0], [0, 1, 3, 2, 4])
    if BITS == 8:
        x = bytes_of_words(gl.reshape(x, [W, P, 32, WORDS]), W, P, WORDS)
        y = gl.inline_asm_elementwise(MOVE, "=r,r,r,r,r", [x], dtype=gl.int8, is_pure=True, pack=4)
        y = gl.permute(gl.reshape(y, [W, P, 8, 4, WORDS, 4]), [0, 4, 2, 1, 3, 5])  # word r | page t byte
    elif BITS == 4:
        x = bytes_of_words(gl.reshape(x, [W, P, 32, WORDS]), W, P, WORDS)
        a, b = gl.inline_asm_elementwise(
            SPEC.VALUE_ASM[0],
            SPEC.VALUE_ASM[1],
            (x,) + spread(registers, W, P, WORDS),
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8),
        )
        y = gl.reshape(gl.join(a, b), [W, P, 8, 4, WORDS, 4, 2])  # page, r, t, word, byte, half
        y = gl.permute(y, [0, 4, 2, 1, 6, 3, 5])  # word r | page half t byte
    elif BITS == 3:
        a, b = gl.split(gl.reshape(x, [W, P, 32, WORDS // 2, 2]))
        a = bytes_of_words(a, W, P, WORDS // 2)
        b = bytes_of_words(b, W, P, WORDS // 2)
        plane = bytes_of_words(gl.reshape(planes[1], [W, P, 32, WORDS // 2]), W, P, WORDS // 2)
        o = gl.inline_asm_elementwise(
            SPEC.VALUE_ASM[0],
            SPEC.VALUE_ASM[1],
            (a, b, plane) + spread(registers, W, P, WORDS // 2),
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
        )
        y = gl.reshape(
            join8(o), [W, P, 8, 4, WORDS // 2, 4, 2, 2, 2]
        )  # page, r, t, pair, byte, odd, half, word
        y = gl.permute(y, [0, 4, 8, 6, 2, 1, 7, 3, 5])  # pair word odd r | page half t byte
    else:
        x = bytes_of_words(gl.reshape(x, [W, P, 32, WORDS]), W, P, WORDS)
        o = gl.inline_asm_elementwise(
            SPEC.VALUE_ASM[0],
            SPEC.VALUE_ASM[1],
            (x,) + spread(registers, W, P, WORDS),
            is_pure=True,
            pack=4,
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
        )
        y = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
        y = gl.reshape(y, [W, P, 8, 4, WORDS, 4, 2, 2])  # page, r, t, word, byte, odd, half
        y = gl.permute(y, [0, 4, 6, 2, 1, 7, 3, 5])  # word odd r | page half t byte
    ZEROS: gl.constexpr = 1 if BITS == 8 else 2
    y = gl.reshape(y, [W, BLOCK // ZEROS, P * 16 * ZEROS])
    return gl.convert_layout(y, operand_layout(W, 0), assert_trivial=True)


@gluon.jit
def weights_of(p, SPEC: gl.constexpr):
    """Weights of 0 to 1, float32 [W, 16 P tokens, R], in fixed point, as a tuple of `_weight_operand`."""
    W: gl.constexpr = SPEC.W
    P: gl.constexpr = SPEC.P
    R: gl.constexpr = SPEC.R
    fixed = p * WEIGHT_ONE + (_MAGIC + 128.0)
    p0, p1 = gl.split(
        gl.permute(gl.reshape(fixed.to(gl.int32, bitcast=True), [W, P, 2, 8, R]), [0, 1, 3, 4, 2])
    )
    if R == 8:
        p0 = gl.permute(gl.reshape(p0, [W, P, 8, 2, 4]), [0, 1, 3, 2, 4])
        p1 = gl.permute(gl.reshape(p1, [W, P, 8, 2, 4]), [0, 1, 3, 2, 4])
    moved = gl.inline_asm_elementwise(_TRANSPOSED, "=r,r,r", [p0, p1], dtype=gl.int32, is_pure=True, pack=1)
    moved = bytes_of_words(gl.reshape(moved, [W, P * R // 4, 32, 1]), W, P * R // 4, 1)
    return _weight_operand(moved, SPEC)


@gluon.jit
def _weight_operand(moved, SPEC: gl.constexpr):
    """Transposed weights, int32 [W, P * R / 4, 32, 1, 4] -> int8 [W, 16 P tokens, 2 R].

    With two parts two operands [W, 32 P, 2 R]: each token's weight followed by a zero, and after one.
    """
    W: gl.constexpr = SPEC.W
    P: gl.constexpr = SPEC.P
    R: gl.constexpr = SPEC.R
    N: gl.constexpr = R // 4
    B: gl.constexpr = operand_layout(W, 1)
    if SPEC.PARTS == 2:
        a, b = gl.inline_asm_elementwise(
            _LOW_WEIGHTS, "=&r,=&r,r,r,r,r", [moved], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
        )
        c, d = gl.inline_asm_elementwise(
            _HIGH_WEIGHTS, "=&r,=&r,r,r,r,r", [moved], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
        )
        low = gl.permute(
            gl.reshape(gl.join(a, b), [W, P, N, 8, 4, 4, 2]), [0, 1, 6, 4, 5, 2, 3]
        )  # page half t byte | column
        high = gl.permute(gl.reshape(gl.join(c, d), [W, P, N, 8, 4, 4, 2]), [0, 1, 6, 4, 5, 2, 3])
        low = gl.convert_layout(gl.reshape(low, [W, P * 32, 2 * R]), B, assert_trivial=True)
        high = gl.convert_layout(gl.reshape(high, [W, P * 32, 2 * R]), B, assert_trivial=True)
        return (low, high)
    else:
        x = gl.inline_asm_elementwise(MOVE, "=r,r,r,r,r", [moved], dtype=gl.int8, is_pure=True, pack=4)
        x = gl.permute(gl.reshape(x, [W, P, N, 8, 4, 4]), [0, 1, 4, 5, 2, 3])
        return (gl.convert_layout(gl.reshape(x, [W, P * 16, 2 * R]), B, assert_trivial=True),)


@gluon.jit
def sum_values(sums, v, weights, W: gl.constexpr):
    """v @ weights for sums [W, M, R]: int32 [W, M, 2 R], whose columns are high and low halves.

    Integers are summed in the low bits of float32 numbers; those of the high halves count 256 each.
    """
    high = gl.full(sums.shape, _MAGIC_HIGH_BITS, gl.int32, sums.type.layout)
    low = gl.full(sums.shape, _MAGIC_BITS, gl.int32, sums.type.layout)
    shape: gl.constexpr = [sums.shape[0], sums.shape[1], 2 * sums.shape[2]]
    zero = gl.convert_layout(gl.reshape(gl.join(high, low), shape), product_layout(W), assert_trivial=True)
    return mma_v2(v, weights, zero)


@gluon.jit
def add_sums(sums, decay, products):
    """sums * decay + what `sum_values` summed, float32 [W, M, R]."""
    shape: gl.constexpr = [sums.shape[0], sums.shape[1], sums.shape[2], 2]
    high, low = gl.split(gl.reshape(products.to(gl.float32, bitcast=True), shape))
    decay = gl.convert_layout(decay, gl.SliceLayout(1, high.type.layout), assert_trivial=True)[:, None, :]
    return sums * decay + ((high - (_MAGIC_HIGH + _MAGIC)) + low)


@gluon.jit
def no_sums(SPEC: gl.constexpr):
    """Zeros as `add_sums` lays its result out: one float32 [W, M, R] for each block and part of it."""
    PARTS: gl.constexpr = SPEC.PARTS
    zeros = ()
    for i in gl.static_range(len(SPEC.VALUE_BLOCKS)):
        for _ in gl.static_range(PARTS):
            products = gl.full(
                [SPEC.W, SPEC.VALUE_BLOCKS[i] // PARTS, 2 * SPEC.R], 0.0, gl.float32, product_layout(SPEC.W)
            )
            zero, _ = gl.split(gl.reshape(products, [SPEC.W, SPEC.VALUE_BLOCKS[i] // PARTS, SPEC.R, 2]))
            zeros = zeros + (zero,)
    return zeros
