"""Attention over the compressed cache in float64, from the definitions: what errors are measured against.

It shares nothing with the kernels or the readable reference but the definitions themselves: which bit of a
page is which bit of a code is found by packing codes that have one bit set, and pages are read bit by bit. So
it runs on whatever device the cache is on, in about a second for a shape of the benchmark.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    CodeOrder,
    Region,
    anchors_of,
    pages_of,
)
from turboquant_kernels.rotation import projection_matrix


def attention(
    codec: Codec,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    query_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    sequences: Sequence[int] | None = None,
) -> torch.Tensor:
    """Weighted sums of values before un-rotation, as decode kernels make them: float64 [rows, q_heads, D].

    Arguments as those of `decode.reference.paged_attention`, with `query_len` query tokens a sequence, one
    sequence after the other. Only the rows of `sequences` are computed, in their order; of all by default.
    Queries that see nothing are zero.
    """
    lengths = seq_lens.tolist()
    chosen = range(len(lengths)) if sequences is None else sequences
    block_size, kv_heads, q_heads = *kv_cache.shape[1:3], query.shape[1]
    used = [-(-lengths[sequence] // block_size) for sequence in chosen]
    blocks = torch.cat(
        [block_table[sequence, :count] for sequence, count in zip(chosen, used, strict=True)]
    ).long()
    key, value = decompress(codec, pages_of(kv_cache, codec.layout)[blocks].flatten(0, 1))
    if codec.fmt.anchor:
        anchors = anchors_of(kv_cache, codec.fmt, codec.head_dim)[blocks].flatten(0, 1).double()
        anchors = anchors.transpose(0, 1) @ rotation(codec, query.device).T
        key = key + anchors.repeat_interleave(BLOCK_TOKENS, dim=1)
    tokens = [count * block_size for count in used]
    keys, values = key.split(tokens, dim=1), value.split(tokens, dim=1)
    rotated = query.double() @ rotation(codec, query.device).T
    rows = []
    for sequence, key, value in zip(chosen, keys, values, strict=True):
        length = lengths[sequence]
        own = rotated[sequence * query_len : (sequence + 1) * query_len]
        own = own.unflatten(1, (kv_heads, q_heads // kv_heads))
        score = torch.einsum("qhgd,hkd->hgqk", own, key[:, :length]) * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        position = torch.arange(length, device=query.device)
        last = length - query_len + torch.arange(query_len, device=query.device)[:, None]
        unseen = position > last
        if window is not None:
            unseen |= position <= last - window
        score = score.masked_fill(unseen, -math.inf)
        # One more column, the sink, so that there is one: of a query that sees nothing all are -inf.
        sink = score.new_full((kv_heads, q_heads // kv_heads, 1, 1), -math.inf)
        if sinks is not None:
            sink = sinks.double().view_as(sink)
        score = torch.cat((score, sink.expand(-1, -1, query_len, 1)), dim=-1)
        weight = score.softmax(-1).nan_to_num(0.0)[..., :-1]
        rows.append(torch.einsum("hgqk,hkd->qhgd", weight, value[:, :length]).flatten(1, 2))
    return torch.cat(rows)


def unrotated(codec: Codec, rotated: torch.Tensor) -> torch.Tensor:
    """R.T y: float64 [..., D] -> float64 [..., D]."""
    return rotated @ rotation(codec, rotated.device)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest |result - exact| / |exact| of a row, the last dimension.

    Infinite where a row is not finite, or where it is not zero and its exact one is.
    """
    difference = (result.double() - exact).norm(dim=-1)
    error = torch.where(difference == 0, 0.0, difference / exact.norm(dim=-1))
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max())


def rotation(codec: Codec, device: torch.device) -> torch.Tensor:
    """R, float64 [D, D] on `device`, y = R x: entries +-1 / sqrt(D), whose signs the codec tells."""
    columns = codec.rotate(torch.eye(codec.head_dim))
    return columns.sign().double().T.to(device) / math.sqrt(codec.head_dim)


def decompress(codec: Codec, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys and values: uint8 [n, kv_heads, page_bytes] -> float64 [kv_heads, n * 16, D] each."""
    layout = codec.layout
    scales = layout.scales.of(pages).contiguous().view(torch.float16).double().unsqueeze(-1)
    keys = _levels(codec.key_order, _rows(pages, layout.key_planes)) * scales[..., KEY_SCALE, :]
    if layout.key_residual_signs is not None:
        negative = _codes(codec.sign_order, _rows(pages, (layout.key_residual_signs,)))
        projection = projection_matrix(codec.head_dim, codec.seed).double().to(pages.device)
        residual = (1.0 - 2.0 * negative.double()) @ projection
        factor = math.sqrt(math.pi / 2) / codec.head_dim
        keys = keys + residual * scales[..., KEY_RESIDUAL_NORM, :] * factor
    values = _levels(codec.value_order, _quad_rows(pages, layout.value_planes)) * scales[..., VALUE_SCALE, :]
    return keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2)


def _rows(pages: torch.Tensor, planes: tuple[Region, ...]) -> torch.Tensor:
    """Planes that lie token after token: uint8 [n, kv_heads, 16, bytes of a token]."""
    shape = (PAGE_TOKENS, -1)
    return torch.cat([_bytes(pages, plane).unflatten(-1, shape) for plane in planes], dim=-1)


def _quad_rows(pages: torch.Tensor, planes: tuple[Region, ...]) -> torch.Tensor:
    """Planes that lie [quad t][byte of a row][b], b a token of the quad: token 8 (b % 2) + 2 t + b // 2.

    As `_rows`: uint8 [n, kv_heads, 16, bytes of a token].
    """
    rows = []
    for plane in planes:
        t_row_b = _bytes(pages, plane).unflatten(-1, (4, plane.token_bytes, 2, 2))
        rows.append(t_row_b.permute(0, 1, 5, 2, 4, 3).flatten(2, 4))
    return torch.cat(rows, dim=-1)


def _bytes(pages: torch.Tensor, plane: Region) -> torch.Tensor:
    return pages[..., plane.offset : plane.offset + PAGE_TOKENS * plane.token_bytes]


def _levels(order: CodeOrder, rows: torch.Tensor) -> torch.Tensor:
    """Codebook levels: float64 [n, kv_heads, 16, D]."""
    book = codebook(order.bits, order.head_dim)
    levels = book.step * (book.grid.double() + 0.5)
    return levels.to(rows.device)[_codes(order, rows)]


def _codes(order: CodeOrder, rows: torch.Tensor) -> torch.Tensor:
    """Codes bit by bit: int64 [n, kv_heads, 16, D]."""
    codes = torch.zeros((), dtype=torch.int64, device=rows.device)
    for bit, index in enumerate(_bit_indices(order).to(rows.device)):
        codes = codes | ((rows[..., index // 8].long() >> index % 8) & 1) << bit
    return codes


@cache
def _bit_indices(order: CodeOrder) -> torch.Tensor:
    """Where a bit of a coordinate's code stands in a token's planes, one after the other: int64 [bits, D]."""
    coordinates = torch.arange(order.head_dim)
    indices = []
    for bit in range(order.bits):
        codes = torch.zeros(order.head_dim, order.head_dim, dtype=torch.uint8)
        codes[coordinates, coordinates] = 1 << bit
        packed = torch.cat(order.pack(codes), dim=-1)
        bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        indices.append(bits.flatten(1).long().argmax(-1))
    return torch.stack(indices)
