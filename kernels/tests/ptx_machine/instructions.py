"""Instructions of PTX that compute: each a function of NumPy arrays, one element for each thread.

`OPERATIONS` names those that occur in this project's kernels, as the PTX ISA defines them; approximations are
exact here. Those that touch memory or decide what runs next are in `program` and `memory`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TYPES = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "bf16": np.dtype("u2"),
}
"""How the bits of a register are read."""

ELECTED = 5
"""The lane of a warp that `elect.sync` chooses: any may be."""


@dataclass(frozen=True)
class Operation:
    """`function` of the sources, each viewed as its type; the last type is that of all further ones.

    Where there are several results it returns a tuple. `effect`: it takes the program and the mask of the
    threads that take part before the sources.
    """

    result: str | None
    sources: tuple[str, ...]
    function: Callable[..., Any]
    effect: bool = False


def _of(
    names: str, function: Callable[..., Any], result: str = "{}", sources: str = "{}"
) -> dict[str, Operation]:
    """The same function under several names; `{}` is the type at a name's end."""
    operations = {}
    for name in names.split():
        own = name.rpartition(".")[2]
        operations[name] = Operation(
            result.format(own), tuple(kind.format(own) for kind in sources.split()), function
        )
    return operations


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0)


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0)


def _upper_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(8 * a.itemsize)


def _wide_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A product of two float32 numbers is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _from_bf16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(a: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = a.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def _fused_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (_from_bf16(x.view(np.uint16)).astype(np.float64) for x in (a, b, c))
    return _to_bf16(a * b + c).view(np.uint32)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the bytes of b:a by nibbles of the selector; bit 3 replicates the byte's sign."""
    pool = np.stack([a, b], axis=1).view(np.int8)
    nibble = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    byte = np.take_along_axis(pool, (nibble & 7).astype(np.int64), axis=1)
    return np.where(nibble & 8, byte >> 7, byte).view(np.uint32)[:, 0]


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit by bit, the entry of the truth table that three bits select."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _dot_of_two(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a & 0xFFFF) * (b & 0xFF) + (a >> 16) * (b >> 8 & 0xFF) + c


def _exchange(a: np.ndarray, lanes: np.ndarray, clamp: np.ndarray, _: np.ndarray) -> np.ndarray:
    assert int(clamp[0]) == 31, "of whole warps only"
    return a.reshape(-1, 32)[:, np.arange(32) ^ int(lanes[0])].ravel()


def _elect(mask: np.ndarray) -> tuple[None, np.ndarray]:
    return None, np.arange(len(mask)) % 32 == ELECTED


def _transpose(a: np.ndarray) -> np.ndarray:
    """Of an 8 x 8 matrix of 16-bit elements, two neighbours of a row in each lane."""
    return a.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1).copy().view(np.uint32).ravel()


def _elements(registers: list[np.ndarray], convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Registers of four or two elements, beside each other in a row: [warps, 8 rows, elements]."""
    return np.concatenate([convert(x).reshape(len(x) // 32, 8, -1) for x in registers], axis=2)


def _matrix_product(convert: Callable[[np.ndarray], np.ndarray], total: type) -> Callable[..., Any]:
    """D = A B + C of 16 x 8 elements: 4 registers of A, 2 of B, 4 of C."""

    def product(*registers: np.ndarray) -> tuple[np.ndarray, ...]:
        a0, a1, a2, a3, b0, b1, *c = registers
        a = np.concatenate([_elements([a0, a2], convert), _elements([a1, a3], convert)], axis=1)
        b = _elements([b0, b1], convert)
        d = (a @ b.transpose(0, 2, 1)).astype(total).reshape(-1, 2, 8, 4, 2)
        sums = (d[:, i // 2, :, :, i % 2].ravel() + c[i] for i in range(4))
        if total is np.int64:
            return tuple(np.clip(x, -(2**31), 2**31 - 1).astype(np.int32) for x in sums)
        return tuple(x.astype(np.float32) for x in sums)

    return product


def _signed_bytes(a: np.ndarray) -> np.ndarray:
    """In float32, which holds sums of 32 products exactly."""
    return a.view(np.int8).astype(np.float32)


def _halves(a: np.ndarray) -> np.ndarray:
    return _from_bf16(a.view(np.uint16)).astype(np.float64)


def _comparisons() -> dict[str, Operation]:
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    kinds = [f"{kind}{bits}" for kind in "sub" for bits in (16, 32, 64)] + ["f32"]
    operations = {}
    for name, function in compare.items():
        plain = " ".join(f"setp.{name}.{kind}" for kind in kinds)
        operations |= _of(plain, function, "pred")
        both = f"setp.{name}.and.b32"
        operations |= _of(both, lambda a, b, p, f=function: f(a, b) & p, "pred", "b32 b32 pred")
    return operations


def _conversions(names: str) -> dict[str, Operation]:
    """From the last type of a name to the one before, which keep the value: a result becomes its type."""
    pairs = {name: name.split(".")[-2:] for name in names.split()}
    return {name: Operation(to, (kind,), lambda a: a) for name, (to, kind) in pairs.items()}


OPERATIONS = {
    **_of("mov.pred mov.u16 mov.b16 mov.u32 mov.b32 mov.b64 mov.u64", lambda a: a),
    "unpack.b32": Operation("b16", ("b32",), lambda a: tuple(a.view(np.uint16).reshape(-1, 2).T.copy())),
    "pack.b32": Operation("b32", ("b16",), lambda a, b: np.stack([a, b], axis=1).view(np.uint32)[:, 0]),
    **_of("add.s16 add.s32 add.s64 add.f32", np.add),
    **_of("sub.s16 sub.s32 sub.s64 sub.f32", np.subtract),
    **_of("mul.lo.s16 mul.lo.s32 mul.lo.s64 mul.f32", np.multiply),
    **_of("mul.hi.u16 mul.hi.u32", _upper_product),
    **_of("mul.wide.s32", _wide_product, "s64"),
    **_of("mul.wide.u32", _wide_product, "u64"),
    **_of("mad.lo.s32 mad.lo.s64", lambda a, b, c: a * b + c),
    **_of("mad.wide.s32", lambda a, b, c: _wide_product(a, b) + c, "s64", "s32 s32 s64"),
    **_of("mad.wide.u16", lambda a, b, c: _wide_product(a, b) + c, "u32", "u16 u16 u32"),
    **_of("mad.wide.u32", lambda a, b, c: _wide_product(a, b) + c, "u64", "u32 u32 u64"),
    **_of("neg.s32 neg.f32", np.negative),
    **_of("min.s32 min.u32 min.s64 min.f32", np.fmin),
    **_of("max.s32 max.u32 max.s64 max.f32", np.fmax),
    **_of("and.pred and.b16 and.b32 and.b64", np.bitwise_and),
    **_of("or.pred or.b16 or.b32 or.b64", np.bitwise_or),
    **_of("xor.pred xor.b16 xor.b32 xor.b64", np.bitwise_xor),
    **_of("not.pred not.b16 not.b32 not.b64", np.invert),
    **_of("shl.b16 shl.b32 shl.b64", _shift_left, sources="{} u32"),
    **_of("shr.u16 shr.s32 shr.u32 shr.s64 shr.u64", _shift_right, sources="{} u32"),
    **_of("bfe.u32", lambda a, at, size: _shift_right(a, at) & _shift_left(np.ones_like(a), size) - 1),
    **_of("prmt.b32", _permute),
    **_of("lop3.b32", _logic),
    "dp2a.lo.u32.u32": Operation("u32", ("u32",), _dot_of_two),
    **_of("selp.b16 selp.b32 selp.b64 selp.f32", lambda a, b, p: np.where(p, a, b), sources="{} {} pred"),
    **_comparisons(),
    **_of("fma.rn.f32", _fused),
    **_of("fma.rn.bf16x2", _fused_bf16x2, "b32", "b32"),
    **_of("sub.bf16", lambda a, b: _to_bf16(_from_bf16(a) - _from_bf16(b))),
    **_of("div.full.f32", np.divide),
    **_of("ex2.approx.ftz.f32", np.exp2),
    **_of("lg2.approx.ftz.f32", np.log2),
    **_conversions("cvt.u32.u16 cvt.u64.u32 cvt.s64.s32 cvt.u16.u32 cvt.u32.u64 cvt.rn.f32.s32 cvt.f32.f16"),
    **_of("cvt.f32.bf16", _from_bf16, "f32"),
    **_of("cvt.rn.bf16.f32", _to_bf16, "bf16"),
    **_of("elect.sync", _elect, "pred", "b32"),
    **_of("shfl.sync.bfly.b32", _exchange),
    **_of("movmatrix.sync.aligned.m8n8.trans.b16", _transpose, "b32", "b32"),
    "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32": Operation(
        "s32", (*["b32"] * 6, "s32"), _matrix_product(_signed_bytes, np.int64)
    ),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": Operation(
        "f32", (*["b32"] * 6, "f32"), _matrix_product(_halves, np.float64)
    ),
}
