"""The readable attention over the compressed paged cache: decode, prefill and mixed batches.

    o_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j

over the tokens j that query i sees: those of its own block as the model made them, earlier ones as the cache
stores them (`turboquant_kernels.raw_block`). Rotations preserve inner products, so queries are rotated once
instead of every stored key back, and the sum of stored values is un-rotated once.

The CPU engine serves from it; GPU kernels are tested against it. `tiles` cuts the batch into equal parts;
here each is computed with the running maximum and sum of an online softmax (FlashAttention, arXiv
2205.14135), many of them at a time, in bounded memory.
"""

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode.tiles import Tiles, tile_batch
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.raw_block import OwnTokens

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
    own: OwnTokens | None = None,
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

    `own`: the raw tokens of each query's block, which it reads in place of what is stored of that block.
    Without them every token is read as stored.

    Returns [num_tokens, q_heads, D] in the query's dtype, or fills and returns `out`. Padding rows and
    queries that see nothing are zero. Arithmetic is float32.
    """
    cache = _Cache(codec, kv_cache, block_table)
    if tiles is None:
        tiles = tile_batch(query_start_loc, seq_lens, window, raw_block=own is not None)
    scaled = query.float() * scale
    output = torch.zeros_like(scaled)
    for same_shape in tiles:
        at_once = max(1, SCRATCH_BYTES // _tile_bytes(same_shape, cache.kv_heads, scaled))
        for group in same_shape.split(at_once):
            rows, used = group.rows()
            result = _attend(cache, scaled[rows], group, window, soft_cap, sinks, own)
            output[rows[used]] = result[used]
    return output.to(query.dtype) if out is None else out.copy_(output)


def _attend(
    cache: "_Cache",
    query: torch.Tensor,
    tiles: Tiles,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    own: OwnTokens | None,
) -> torch.Tensor:
    """Attention of some tiles: float32 [n, width, q_heads, D], queries scaled -> same shape."""
    _, width, q_heads, _ = query.shape
    group = q_heads // cache.kv_heads
    # The rows of one matrix product are all queries that share a KV head.
    query = query.unflatten(2, (cache.kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    rotated = cache.codec.rotate(query)
    query_position = (tiles.position[:, None] + torch.arange(width))[:, :, None]
    softmax = _OnlineSoftmax(query, group, sinks)

    def add(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor) -> None:
        """position: int64 [n, tokens], those of the tokens."""
        score = query @ key.mT
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        n, position = len(key), position[:, None]
        unseen = position > query_position[:n]
        if window is not None:
            unseen |= position <= query_position[:n] - window
        score.unflatten(2, (group, width)).masked_fill_(unseen[:, None, None], float("-inf"))
        softmax.add(score, value)

    context = tiles.context()
    for offset in range(0, int(context[0]), tiles.chunk):
        # Tiles stand longest first, so those that have a chunk here are the first ones.
        n = int((context > offset).sum())
        first = tiles.start[:n, None] + offset
        key, value = cache.read(tiles.sequence[:n, None], first, tiles.chunk)
        position = first + torch.arange(tiles.chunk)
        # What follows the stored tokens is none, whatever its page holds.
        position = position.where(position < tiles.end[:n, None], _NEVER)
        add(rotated[:n], key, value, position)
    softmax.output = cache.codec.unrotate(softmax.output)
    if own is not None:
        block = tiles.position // BLOCK_TOKENS
        key, value = (x.float().transpose(1, 2) for x in own.block(tiles.sequence, block))
        add(query, key, value, block[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS))
    return softmax.result().unflatten(2, (group, width)).permute(0, 3, 1, 2, 4).flatten(2, 3)


_NEVER = 2**62
"""A position that no query sees."""


class _OnlineSoftmax:
    """The running maximum, sum of weights and sum of weighted values of some tiles."""

    def __init__(self, query: torch.Tensor, group: int, sinks: torch.Tensor | None) -> None:
        """query: float32 [n, kv_heads, group * width, D]; sinks as `paged_attention` takes them."""
        # Finite, so that tokens of which a query sees none leave exp(maximum - maximum) = 1.
        self.maximum = query.new_full((*query.shape[:-1], 1), torch.finfo(torch.float32).min)
        self.total = torch.zeros_like(self.maximum)
        self.output = torch.zeros_like(query)
        if sinks is not None:
            by_head = self.maximum.unflatten(2, (group, -1))
            by_head.copy_(sinks.reshape(query.shape[1], group, 1, 1))
            self.total.fill_(1.0)

    def add(self, score: torch.Tensor, value: torch.Tensor) -> None:
        """Scores of the first n tiles, [n, kv_heads, group * width, tokens], and [n, kv_heads, tokens, D]."""
        n = len(score)
        maximum = torch.maximum(self.maximum[:n], score.amax(-1, keepdim=True))
        weight = score.sub_(maximum).exp_()
        decay = torch.exp(self.maximum[:n] - maximum)
        self.total[:n] = self.total[:n] * decay + weight.sum(-1, keepdim=True)
        self.output[:n] = self.output[:n] * decay + weight @ value
        self.maximum[:n] = maximum

    def result(self) -> torch.Tensor:
        """Zero for queries that see nothing."""
        return self.output / self.total.clamp_min(torch.finfo(torch.float32).tiny)


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
            anchor = self.anchors[block, page * PAGE_TOKENS // BLOCK_TOKENS].transpose(1, 2)
            key += self.codec.rotate(anchor).unsqueeze(-2)
        return key.flatten(2, 3), value.flatten(2, 3)


def _tile_bytes(tiles: Tiles, kv_heads: int, query: torch.Tensor) -> int:
    """Scratch memory of one tile: float32 keys, values and scores of a chunk."""
    q_heads, head_dim = query.shape[1:]
    return 4 * tiles.chunk * (2 * kv_heads * head_dim + q_heads * tiles.width)
