"""The raw block: what a query sees of its own block, and where that lies between steps.

    position   0 .. 127   128 .. 255   256 .. 299
               stored     stored       raw          for the query at 299

Positions are cut into blocks of `BLOCK_TOKENS`. A query reads the keys and values of its own block as the
model made them and those of every earlier block as the cache stores them, whatever chunks the prompt came in
and whatever else runs. A block is encoded once, in the step that brings its last token.

Until then its tokens lie in the blocks that follow it in the sequence's block table, which the engine gives
each sequence beyond those of its tokens (`RawBlocks.blocks` of them). They start in the last of these, the
one that the block before did not use: so a block's raw tokens are whole while the first
`RawBlocks.tokens_per_block` tokens of the next are written, and a block that drafts completed can be encoded
again with the tokens that replace them.

Readable PyTorch, from which the CPU engine serves; GPU kernels are tested against it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from turboquant_kernels.formats import BLOCK_TOKENS


@dataclass(frozen=True)
class RawBlocks:
    """Where raw tokens lie; the same for all layers of an engine."""

    blocks: int
    """Entries of the block table that hold a raw block: `KVFormat.raw_blocks` of the engine's smallest
    format."""
    dtype: torch.dtype
    """Of keys and values."""

    @property
    def tokens_per_block(self) -> int:
        return -(-BLOCK_TOKENS // self.blocks)

    def place(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token the entry of the block table and the index in `view`: int64 of any shape."""
        block, index = position // BLOCK_TOKENS, position % BLOCK_TOKENS
        part = index // self.tokens_per_block
        return block + torch.where(part > 0, part, self.blocks), index % self.tokens_per_block

    def view(self, kv_cache: torch.Tensor, head_dim: int) -> torch.Tensor:
        """The cache as raw tokens: [num_blocks, kv_heads, 2, tokens_per_block, D], keys before values.

        kv_cache: uint8 [num_blocks, BLOCK_TOKENS, kv_heads, slot_bytes] as for `packing.pages_of`; a raw
        block may take the bytes of anchors too.
        """
        num_blocks, _, kv_heads, _ = kv_cache.shape
        tokens = self.tokens_per_block
        token_bytes = head_dim * self.dtype.itemsize
        # Made by hand, since no operation on `kv_cache` reaches beyond its own shape.
        raw = kv_cache.as_strided(
            (num_blocks, kv_heads, 2, tokens, token_bytes),
            (kv_cache.stride(0), 2 * tokens * token_bytes, tokens * token_bytes, token_bytes, 1),
        )
        return raw.view(self.dtype)


@dataclass(frozen=True)
class Step:
    """The sequences of one step of the engine and their new tokens, which are the rows of a batch."""

    query_start_loc: torch.Tensor
    """int [num_seqs + 1]: where each sequence's rows begin."""
    seq_lens: torch.Tensor
    """int [num_seqs]: each sequence's length, new tokens included."""
    block_table: torch.Tensor
    """int [num_seqs, max_blocks], the blocks of raw tokens included."""
    slot_mapping: torch.Tensor
    """int [rows]: -1 for a row that is not stored."""

    @cached_property
    def query_lens(self) -> torch.Tensor:
        return self.query_start_loc.long().diff()

    @cached_property
    def starts(self) -> torch.Tensor:
        """int64 [num_seqs]: position of each sequence's first new token."""
        return self.seq_lens.long() - self.query_lens

    @cached_property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that are stored, with their sequences and positions: int64 [n] each."""
        row = torch.arange(int(self.query_start_loc[-1]))
        sequence = torch.arange(len(self.query_lens)).repeat_interleave(self.query_lens)
        position = row + (self.starts - self.query_start_loc[:-1].long())[sequence]
        stored = self.slot_mapping[: len(row)] >= 0
        return row[stored], sequence[stored], position[stored]

    @cached_property
    def completed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks whose last token is a new one: sequences and indices of blocks, int64 [n] each."""
        _, sequence, position = self.rows
        last = position % BLOCK_TOKENS == BLOCK_TOKENS - 1
        return sequence[last], position[last] // BLOCK_TOKENS

    def kept_raw(self, most_drafts: int) -> torch.Tensor:
        """Which of `rows` must be found raw by later steps: bool [n].

        Those of blocks that stay open; and all of a sequence that has few new tokens, since these may be
        drafts: where some are rejected, others take their places and the block is encoded again.
        """
        _, sequence, position = self.rows
        is_open = position >= (self.seq_lens.long() // BLOCK_TOKENS * BLOCK_TOKENS)[sequence]
        return is_open | (self.query_lens <= most_drafts)[sequence]


@dataclass(frozen=True)
class OwnTokens:
    """Raw keys and values of the blocks that a step's tokens lie in, taken before the step stores
    anything."""

    step: Step
    key: torch.Tensor
    """[rows, kv_heads, D]: the new tokens."""
    value: torch.Tensor
    before: torch.Tensor
    """[num_seqs, BLOCK_TOKENS, kv_heads, 2, D]: the tokens of the block in which the new ones begin, by their
    index in it. Those at and after the first new token are anything."""

    @classmethod
    def of(
        cls, step: Step, raw: RawBlocks, kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> "OwnTokens":
        """key, value: [rows, kv_heads, D], the new tokens; kv_cache as for `RawBlocks.view`."""
        first = step.starts // BLOCK_TOKENS * BLOCK_TOKENS
        entry, index = raw.place(first[:, None] + torch.arange(BLOCK_TOKENS))
        # Entries past the end of a table belong to no token.
        entry = entry.clamp_max(step.block_table.shape[1] - 1)
        block = step.block_table.long().gather(1, entry).clamp(0, len(kv_cache) - 1)
        return cls(step, key, value, raw.view(kv_cache, key.shape[-1])[block, :, :, index])

    def block(self, sequence: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks: int64 [n] each -> [n, BLOCK_TOKENS, kv_heads, D] each.

        The blocks hold new tokens of their sequences; what follows a sequence's last one is zero.
        """
        step = self.step
        position = block[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        since_start = position - step.starts[sequence, None]
        row = (step.query_start_loc[:-1].long()[sequence, None] + since_start).clamp(0, len(self.key) - 1)
        is_new = (since_start >= 0)[..., None, None]
        absent = (since_start >= step.query_lens[sequence, None])[..., None, None]

        def read(new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
            return torch.where(is_new, new[row], before[sequence]).masked_fill_(absent, 0)

        return read(self.key, self.before[..., 0, :]), read(self.value, self.before[..., 1, :])
