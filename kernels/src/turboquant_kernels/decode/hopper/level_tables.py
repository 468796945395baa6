"""The tables of levels that the fragments look up, on a device."""

from functools import cache

import torch

from turboquant_kernels.decode.hopper.fragments import WORD_SHIFT, level_table, table_registers
from turboquant_kernels.formats import KVFormat


def table_words(bits: int, head_dim: int) -> list[int]:
    """The words that a fragment takes from registers: those of its table, then `WORD_SHIFT`."""
    table = level_table(bits, head_dim)
    return [*(table[i] for i in table_registers(bits)), WORD_SHIFT]


@cache
def device_tables(fmt: KVFormat, head_dim: int, device: torch.device) -> torch.Tensor:
    """int32 [words, 32]: the words for keys and for values, a copy for each lane."""
    words = table_words(fmt.key_bits, head_dim) + table_words(fmt.value_bits, head_dim)
    return torch.tensor(words, dtype=torch.int32)[:, None].repeat(1, 32).to(device)
