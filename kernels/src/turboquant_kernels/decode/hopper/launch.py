"""Which caches the Hopper kernel reads, and how it is launched: what can be known without the kernel.

Nothing here imports Gluon, which is experimental and not needed where another kernel serves.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import triton

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import PAGE_TOKENS, Encoding, KVFormat
from turboquant_kernels.packing import PLANES

STAGES = 2
"""Tiles of a warp in shared memory: the one that it computes and the next. Three were slower, on an H200."""

WEIGHT_ONE = 127 * 256
"""Fixed-point weight of a tile's largest token: both halves are int8."""

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
"""Head dimensions of this kernel."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched for one format, head dimension and number of rows."""

    rows: int
    """Query heads times query tokens that a program holds: 4 or 8."""
    pages: int
    """Pages of a warp's tile."""
    programs_per_sm: int
    """Programs that fit on a multiprocessor, for the number of splits."""
    value_block: int
    """Coordinates of values that are unpacked at once, 64 or 128: fewer take fewer registers."""
    shared_queries: bool
    """Whether queries stand in shared memory, where their registers are wanted for other things."""
    evict_first: bool
    """Whether the L2 cache drops pages before what will be read again."""
    max_registers: int | None
    """Registers of a thread at most."""
    num_warps: int = 4

    @property
    def tile_tokens(self) -> int:
        """Tokens that a program reads at a time."""
        return self.num_warps * self.pages * PAGE_TOKENS

    def row_groups(self, rows: int) -> int:
        """Programs that share the rows of one KV head."""
        return triton.cdiv(rows, self.rows)


def supports(fmt: KVFormat, head_dim: int, capability: int, block_stride: int) -> bool:
    """Whether this kernel reads a cache of this format, with blocks `block_stride` bytes apart."""
    known = fmt.encoding is Encoding.MSE and head_dim in HEAD_DIMS
    if head_dim == 80 and (PLANES[fmt.key_bits][-1] == 1 or fmt.value_bits == 3):
        return False  # rows of ten bytes in an order of their own, and slots that are no whole words
    return known and capability == 90 and block_stride % 16 == 0


def launch_of(fmt: KVFormat, head_dim: int, rows: int, short: bool = False) -> Launch:
    """The tuned launch for `rows` rows (query heads of a KV head times query tokens); `short` where a program
    has few tokens to read."""
    held = 4 if rows <= 4 else 8
    head_dim = 128 if head_dim in (80, 96) else head_dim
    asked = {
        "head_dim": head_dim,
        "rows": held,
        "key_bits": fmt.key_bits,
        "value_bits": fmt.value_bits,
        "short": short,
    }
    for rule in _rules():
        if all(asked[name] in values for name, values in rule["where"].items()):
            return Launch(rows=held, **rule["launch"])
    raise AssertionError("the last rule has no conditions")


@cache
def _rules() -> list[dict[str, Any]]:
    """Launches as tuned on the GPUs that the file names; the first rule whose conditions hold is taken."""
    return json.loads(files("turboquant_kernels").joinpath("tuning/hopper_decode.json").read_text())["rules"]


def value_unit(codec: Codec) -> float:
    """What the sums of this kernel count in: a step of the value codebook times the unit of a weight."""
    return codebook(codec.fmt.value_bits, codec.head_dim).step / WEIGHT_ONE
