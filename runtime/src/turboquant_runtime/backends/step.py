"""One step of the engine on a GPU: its sequences by road, and what the layers share.

The metadata builder makes these from vLLM's description of the batch. The decode's schedule and the prefill's
tiles depend on layers' shapes and windows: the first layer that asks makes them, the others get the same.
"""

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context, is_forward_context_available
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.launch import Workspace
from turboquant_kernels.prefill.attention import scratch_tokens
from turboquant_kernels.prefill.tiles import Tile, plan_tiles
from turboquant_runtime.backends.base import refuse_other_than_causal
from turboquant_runtime.backends.division import divide
from turboquant_runtime.backends.workspaces import workspace_of


@dataclass
class Decodes:
    """The sequences of a step that are decoded, `query_len` query tokens each."""

    query_len: int
    tokens: int
    """Rows of the batch that are theirs, the first ones."""
    places: torch.Tensor | None
    """int64 [tokens], on the device: `division.Division.places`."""
    seq_lens: torch.Tensor
    """int32 [num_seqs]: each sequence's length, its query tokens included."""
    block_table: torch.Tensor
    """int32 [num_seqs, max_blocks]: the blocks that hold each sequence, in order."""
    _workspaces: dict[tuple[Any, ...], Workspace] = field(default_factory=dict)
    _pass: weakref.ref[ForwardContext] | None = None

    def workspace(self, codec: Codec, kv_cache: torch.Tensor, q_heads: int, window: int | None) -> Workspace:
        """Buffers with this step's schedule; layers of the same shape and window share it.

        Within one pass through a model: a draft model that is handed the target's batch has a graph of its
        own, which must not count on the target's graph having been run before it.
        """
        self._forget_other_passes()
        key = (codec, kv_cache.shape[1:], kv_cache.stride(0), q_heads, window)
        if key not in self._workspaces:
            workspace = workspace_of(codec, kv_cache, self.block_table, self.query_len, q_heads, window)
            workspace.deal_out(self.seq_lens, window)
            self._workspaces[key] = workspace
        return self._workspaces[key]

    def _forget_other_passes(self) -> None:
        context = get_forward_context() if is_forward_context_available() else None
        if context is not None and (self._pass is None or self._pass() is not context):
            self._workspaces.clear()
            self._pass = weakref.ref(context)


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
            self._tiles[capacity, window] = [_to_device(t, self.block_table.device) for t in planned]
        return self._tiles[capacity, window]


def _to_device(tile: Tile, device: torch.device) -> Tile:
    """The tile on a device. From pageable memory the copy would wait for all work before it."""
    if device.type == "cuda":
        tile = replace(
            tile,
            query_starts=tile.query_starts.pin_memory(),
            key_starts=tile.key_starts.pin_memory(),
            runs=tile.runs.pin_memory(),
        )
    return tile.to(device)


@dataclass
class CompressedCUDAMetadata(AttentionMetadata):
    """One step's batch, the same for every layer of a cache group."""

    decodes: Decodes | None
    prefills: Prefills | None


def decode_limit(vllm_config: VllmConfig) -> int:
    """Query tokens up to which a sequence is decoded: those of a verification after speculation.

    And one more, with which a draft model is fed the token that the target added. Their lengths are known on
    the device alone, so they may never be planned on the host.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.num_speculative_tokens:
        return 1
    return 2 + (2 if speculative.parallel_drafting else 1) * speculative.num_speculative_tokens


def step_of(common: CommonAttentionMetadata, limit: int, device: torch.device) -> CompressedCUDAMetadata:
    """A step from vLLM's description of the batch, whose leading sequences have few query tokens.

    limit: query tokens up to which a sequence is decoded. Raises NotImplementedError for a batch that is not
    causal.
    """
    refuse_other_than_causal(common)
    division = divide(common.query_start_loc_cpu.numpy(), limit)
    split, end = division.decodes, division.decodes + division.prefills
    decodes = prefills = None
    if division.decodes:
        decodes = Decodes(
            division.query_len,
            division.decode_tokens,
            None if division.places is None else _indices(division.places, device),
            common.seq_lens[:split],
            common.block_table_tensor[:split],
        )
    if division.prefills:
        # Exact for prompts, which are known, whatever was speculated elsewhere.
        seq_lens = common.seq_lens_cpu_upper_bound
        assert seq_lens is not None, "vLLM's runners know the lengths of prompts"
        prefills = Prefills(
            division.query_starts, seq_lens[split:end].tolist(), common.block_table_tensor[split:end]
        )
    return CompressedCUDAMetadata(decodes, prefills)


def _indices(indices: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(indices)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
