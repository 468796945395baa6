"""The readable attention over the compressed paged cache: decode, prefill and mixed batches.

    o_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j

over the tokens j that query i sees, keys and values as the cache stores them, those of the query's own chunk
included. Rotations preserve inner products, so queries are rotated once instead of every key back, and the
output is un-rotated once.

The CPU engine serves from it; GPU kernels are tested against it. `tiles` cuts the batch into equal parts;
here each is computed with the running maximum and sum of an online softmax (FlashAttention, arXiv
2205.14135), many of them at a time, in bounded memory.
"""

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.tiles import Tiles, tile_batch
from turboquant_kernels.formats import ANCHOR_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import anchors_of, pages_of

SCRATCH_BYTES = 8 << 20
"""Decompressed keys and values, and scores, that are held at a time. Larger tensors leave the caches and the
allocator maps them anew each time: 64 MiB took 2.4 times as long (4 sequences of 2,000 tokens, 8 heads)."""


def paged_attention(
    codec: Codec,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: list[Tiles] | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch of queries to their sequences in the compressed cache.

    query: any float [num_tokens, q_heads, D], q_heads a multiple of kv_heads; rows from query_start_loc[-1]
    on are padding. kv_cache: uint8 [num_blocks, block_size, kv_heads, slot_bytes], followed in each block by
    its key anchors where the format has them; a key is what is stored plus its anchor. block_table: int
    [num_seqs, max_blocks]. query_start_loc: int [num_seqs + 1]: where each sequence's queries begin.
    seq_lens: int [num_seqs], query tokens included, which are stored already.

    Query i of a sequence's n queries stands at position seq_len - n + i and sees the positions up to its
    own, of these the last `window` where one is given. `scale` multiplies the scores, `soft_cap` c bounds
    them to c * tanh(score / c) (None or 0: off), `sinks` (float [q_heads]) are scores of one more token
    without a value. `tiles` saves the layers of one step from cutting the same batch again: `tile_batch` of
    the same lengths and window.

    Returns [num_tokens, q_heads, D] in the query's dtype, or fills and returns `out`. Padding rows and
    queries that see nothing are zero. Arithmetic is float32.
    """
    cache = _Cache(codec, kv_cache, block_table)
    if tiles is None:
        tiles = tile_batch(query_start_loc, seq_lens, window)
    rotated = codec.rotate(query) * scale
    output = torch.zeros_like(rotated)
    for same_shape in tiles:
        at_once = max(1, SCRATCH_BYTES // _tile_bytes(same_shape, cache.kv_heads, rotated))
        for group in same_shape.split(at_once):
            rows, used = group.rows()
            result = _attend(cache, rotated[rows], group, window, soft_cap, sinks)
            output[rows[used]] = result[used]
    output = codec.unrotate(output)
    return output.to(query.dtype) if out is None else out.copy_(output)


def _attend(
    cache: "_Cache",
    query: torch.Tensor,
    tiles: Tiles,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of some tiles: float32 [n, width, q_heads, D], queries rotated and scaled -> same shape."""
    n, width, q_heads, head_dim = query.shape
    kv_heads = cache.kv_heads
    group = q_heads // kv_heads
    # The rows of one matrix product are all queries that share a KV head.
    query = query.view(n, width, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    query_position = (tiles.position[:, None] + torch.arange(width))[:, :, None]

    # Finite, so that a chunk of which a query sees nothing leaves exp(maximum - maximum) = 1.
    maximum = query.new_full((n, kv_heads, group * width, 1), torch.finfo(torch.float32).min)
    total = torch.zeros_like(maximum)
    if sinks is not None:
        maximum.unflatten(2, (group, width)).copy_(sinks.reshape(kv_heads, group, 1, 1))
        total.fill_(1.0)
    output = torch.zeros_like(query)

    context = tiles.context()
    for offset in range(0, int(context[0]), tiles.chunk):
        # Tiles stand longest first, so those that have a chunk here are the first ones.
        n = int((context > offset).sum())
        first = tiles.start[:n, None] + offset
        key, value = cache.read(tiles.sequence[:n, None], first, tiles.chunk)

        score = query[:n] @ key.mT
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        position = (first + torch.arange(tiles.chunk))[:, None]
        unseen = position > query_position[:n]
        if window is not None:
            unseen |= position <= query_position[:n] - window
        score.unflatten(2, (group, width)).masked_fill_(unseen[:, None, None], float("-inf"))

        new_maximum = torch.maximum(maximum[:n], score.amax(-1, keepdim=True))
        weight = score.sub_(new_maximum).exp_()
        decay = torch.exp(maximum[:n] - new_maximum)
        total[:n] = total[:n] * decay + weight.sum(-1, keepdim=True)
        output[:n] = output[:n] * decay + weight @ value
        maximum[:n] = new_maximum
    output = output / total.clamp_min(torch.finfo(torch.float32).tiny)
    return output.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Cache:
    """The compressed cache of one layer, read by positions of sequences."""

    def __init__(self, codec: Codec, kv_cache: torch.Tensor, block_table: torch.Tensor) -> None:
        self.codec = codec
        self.block_table = block_table
        self.pages = pages_of(kv_cache, codec.layout)
        self.anchors = anchors_of(kv_cache, codec.fmt, codec.head_dim) if codec.fmt.anchor else None
        self.kv_heads = self.pages.shape[2]

    def read(
        self, sequence: torch.Tensor, first: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values of `tokens` positions from `first` on: float32 [n, kv_heads, tokens, D].

        sequence, first: int64 [n, 1]. Positions past the end of a sequence read some page or other, to be
        masked: their entries in the block table may hold anything.
        """
        num_blocks, pages_per_block = self.pages.shape[:2]
        page = first // PAGE_TOKENS + torch.arange(tokens // PAGE_TOKENS)
        entry = (page // pages_per_block).clamp_max(self.block_table.shape[1] - 1)
        block = self.block_table[sequence, entry].clamp(0, num_blocks - 1)
        page = page % pages_per_block
        # As 8-byte words, since indexing copies element by element.
        encoded = self.pages.view(torch.int64)[block, page].view(torch.uint8).transpose(1, 2)
        key, value = self.codec.read_rotated_keys(encoded), self.codec.read_rotated_values(encoded)
        if self.anchors is not None:
            anchor = self.anchors[block, page * PAGE_TOKENS // ANCHOR_TOKENS].transpose(1, 2)
            key += self.codec.rotate(anchor).unsqueeze(-2)
        return key.flatten(2, 3), value.flatten(2, 3)


def _tile_bytes(tiles: Tiles, kv_heads: int, query: torch.Tensor) -> int:
    """Scratch memory of one tile: float32 keys, values and scores of a chunk."""
    q_heads, head_dim = query.shape[1:]
    return 4 * tiles.chunk * (2 * kv_heads * head_dim + q_heads * tiles.width)
