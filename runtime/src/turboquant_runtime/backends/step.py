"""One step of the engine on a GPU: its sequences to decode and to prefill, made from vLLM's description."""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata, max_decode_query_len

from turboquant_kernels.prefill.attention import scratch_tokens
from turboquant_kernels.prefill.tiles import Tile, plan_tiles
from turboquant_runtime.backends.base import refuse_other_than_causal
from turboquant_runtime.backends.batch import split_batch


@dataclass
class Decodes:
    """The sequences of a step that are decoded, `query_len` query tokens each."""

    query_len: int
    tokens: int
    """Rows of the batch that are theirs, the first ones."""
    padded_rows: torch.Tensor | None
    """int64 [tokens], on the device: `batch.BatchSplit.padded_rows`."""
    seq_lens: torch.Tensor
    """int32 [num_seqs]: each sequence's length, its query tokens included."""
    block_table: torch.Tensor
    """int32 [num_seqs, max_blocks]: the blocks that hold each sequence, in order."""


@dataclass
class Prefills:
    """The sequences of a step whose prompts are read: the batch's rows after those of the decodes."""

    query_starts: list[int]
    """Where each sequence's rows begin, from the first of these rows on, and the end."""
    seq_lens: list[int]
    """Each sequence's length, its rows included."""
    block_table: torch.Tensor
    """int32 [num_seqs, max_blocks]."""
    _tiles: dict[tuple[int, int | None], list[Tile]] = field(default_factory=dict)

    def tiles(self, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None) -> list[Tile]:
        """How the context is cut; layers whose scratch holds as many tokens share it."""
        capacity = scratch_tokens(kv_heads, head_dim, dtype)
        if (capacity, window) not in self._tiles:
            planned = plan_tiles(self.query_starts, self.seq_lens, capacity=capacity, window=window)
            self._tiles[capacity, window] = [tile.to(self.block_table.device) for tile in planned]
        return self._tiles[capacity, window]


@dataclass
class CompressedCUDAMetadata(AttentionMetadata):
    """One step's batch, the same for every layer of a cache group."""

    decodes: Decodes | None
    prefills: Prefills | None


def decode_limit(vllm_config: VllmConfig) -> int:
    """Query tokens up to which a sequence is decoded: those of a verification after speculation.

    And one more, with which the first model runner feeds a draft model the token that the target added. Their
    lengths are known on the device alone, so they may never be planned on the host.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.num_speculative_tokens:
        return 1
    return 1 + max_decode_query_len(vllm_config)


def step_of(common: CommonAttentionMetadata, limit: int, device: torch.device) -> CompressedCUDAMetadata:
    """A step from vLLM's description of the batch, whose leading sequences have few query tokens.

    limit: query tokens up to which a sequence is decoded. Raises NotImplementedError for a batch that is not
    causal.
    """
    refuse_other_than_causal(common)
    batch = split_batch(common.query_start_loc_cpu.numpy(), limit)
    decodes = prefills = None
    if batch.decodes:
        decodes = Decodes(
            batch.query_len,
            batch.decode_tokens,
            None if batch.padded_rows is None else _to_device(batch.padded_rows, device),
            common.seq_lens[: batch.decodes],
            common.block_table_tensor[: batch.decodes],
        )
    if batch.prefills:
        # Exact for prompts, which are known, whatever was speculated elsewhere.
        seq_lens = common.seq_lens_cpu_upper_bound
        assert seq_lens is not None, "vLLM's runners know the lengths of prompts"
        rows = slice(batch.decodes, batch.decodes + batch.prefills)
        prefills = Prefills(batch.query_starts, seq_lens[rows].tolist(), common.block_table_tensor[rows])
    return CompressedCUDAMetadata(decodes, prefills)


def _to_device(indices: np.ndarray, device: torch.device) -> torch.Tensor:
    """From pinned memory: a copy from pageable memory would wait for all work before it."""
    tensor = torch.from_numpy(indices)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
