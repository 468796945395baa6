"""Which blocks the chunks of prompts complete, and which they leave open: plain numbers, made once a step.

A chunk is cut where blocks end:

    blocks       |-------------|-------------|-------------|-------------|
    chunk              |-------|-------------|-----|
    items              begun       whole      open

A begun block has its first tokens raw in the cache, in blocks behind it, which are those that whole ones are
encoded into. So begun blocks that are completed stand first among the items, to be encoded before the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from turboquant_kernels.formats import BLOCK_TOKENS


@dataclass(frozen=True, eq=False)
class BlockItems:
    """The new tokens of some sequences, those of a block an item."""

    indices: torch.Tensor
    """int32 [items, 4]: sequence, position of the first token, its row in the batch, number of tokens. A
    block whose last token is among them is complete. A row is 16 bytes: Triton compiles a kernel anew for a
    pointer to other multiples."""
    begun: int
    """Items, the first ones, that complete a block of which earlier steps brought tokens."""

    def to(self, device: torch.device) -> "BlockItems":
        """The same items on a device, by one copy that the host does not wait for.

        For a GPU from pinned memory: a copy from pageable memory would wait for all work before it.
        """
        pin = device.type == "cuda" and self.indices.device.type == "cpu"
        indices = self.indices.pin_memory() if pin else self.indices
        return replace(self, indices=indices.to(device, non_blocking=True))


def plan_blocks(query_start_loc: Sequence[int], seq_lens: Sequence[int]) -> BlockItems:
    """The items of a batch on the CPU.

    query_start_loc: where each sequence's new tokens begin, and the end; seq_lens: tokens of each sequence,
    the new ones included.
    """
    begun, others = [], []
    for sequence, end in enumerate(seq_lens):
        row, end_row = query_start_loc[sequence], query_start_loc[sequence + 1]
        position = end - (end_row - row)
        while position < end:
            block_end = (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS
            count = min(block_end, end) - position
            completes_begun = position + count == block_end and count < BLOCK_TOKENS
            (begun if completes_begun else others).append((sequence, position, row, count))
            position, row = position + count, row + count
    return BlockItems(torch.tensor(begun + others, dtype=torch.int32).view(-1, 4), len(begun))
