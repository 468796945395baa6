"""The readable store: encode new keys and values, pack them, scatter them into the paged cache.

The CPU engine stores with it; GPU kernels are tested against it.
"""

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import CodeOrder, Region, anchors_of, pages_of, row_of
from turboquant_kernels.raw_block import OwnTokens, RawBlocks


def store_step(codec: Codec, own: OwnTokens, kv_cache: torch.Tensor, raw: RawBlocks) -> None:
    """Stores a step's new tokens: encodes the blocks that they complete, and keeps the others raw.

    kv_cache: uint8 [num_blocks, BLOCK_TOKENS, kv_heads, slot_bytes]. The anchor of a block is the mean of its
    keys.
    """
    step = own.step
    sequence, block = step.completed
    if len(sequence):
        key, value = own.block(sequence, block)
        number = step.block_table[sequence, block].long()
        if codec.fmt.anchor:
            anchors_of(kv_cache, codec.fmt, codec.head_dim)[number, 0] = block_mean(key)
        slots = number[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        store(codec, key.flatten(0, 1), value.flatten(0, 1), kv_cache, slots.flatten())

    row, sequence, position = (x[step.kept_raw(raw.tokens_per_block)] for x in step.rows)
    entry, index = raw.place(position)
    tokens = torch.stack((own.key[row], own.value[row]), dim=2)
    raw.view(kv_cache, codec.head_dim)[step.block_table[sequence, entry].long(), :, :, index] = tokens


def block_mean(key: torch.Tensor) -> torch.Tensor:
    """The mean of the keys of whole blocks: any float [..., BLOCK_TOKENS, kv_heads, D] -> bf16 [...,
    kv_heads, D]. Zero where it is not finite. Neighbours are added first, so that a block is stored as the
    same bytes wherever it is encoded."""
    total = key.float()
    while total.shape[-3] > 1:
        total = total[..., 0::2, :, :] + total[..., 1::2, :, :]
    return (total.squeeze(-3) / BLOCK_TOKENS).bfloat16().nan_to_num(0.0, 0.0, 0.0)


def store(
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes the keys and values of new tokens into their slots of `kv_cache`, in place.

    key, value: any float [num_tokens, kv_heads, D]. kv_cache: uint8 [num_blocks, block_size, kv_heads,
    slot_bytes], see `packing.pages_of`. slot_mapping: int [n], n <= num_tokens: slot of each of the first n
    tokens, block * block_size + offset; -1 is padding and is skipped. Bytes of other slots stay as they are.
    Slots are distinct.

    With key anchors, those of the slots stand in the cache already (`packing.anchors_of`), as vectors that
    are not rotated; what is stored of a key is its difference to its anchor.
    """
    layout = codec.layout
    pages = pages_of(kv_cache, layout)
    used = (slot_mapping >= 0).nonzero().squeeze(-1)
    slot = slot_mapping[used].long()
    block_size = kv_cache.shape[1]
    block, offset = slot // block_size, slot % block_size
    page, row = offset // PAGE_TOKENS, row_of(offset % PAGE_TOKENS)

    key, value = key[used], value[used]
    if codec.fmt.anchor:
        anchors = anchors_of(kv_cache, codec.fmt, codec.head_dim)
        key = key.float() - anchors[block, offset // BLOCK_TOKENS].float()
    keys, values = codec.encode(key, value)

    def write(region: Region, data: torch.Tensor) -> None:
        """data: uint8 [used tokens, kv_heads, token_bytes]."""
        region.rows(pages)[block, page, :, *row] = data

    def write_codes(planes: tuple[Region, ...], order: CodeOrder, codes: torch.Tensor) -> None:
        for region, plane in zip(planes, order.pack(codes), strict=True):
            write(region, plane)

    scales = [keys.scale, values.scale]
    write_codes(layout.key_planes, codec.key_order, keys.codes)
    write_codes(layout.value_planes, codec.value_order, values.codes)
    if keys.residual_signs is not None and keys.residual_norm is not None:
        write_codes((layout.key_residual_signs,), codec.sign_order, keys.residual_signs)
        scales.append(keys.residual_norm)
    write(layout.scales, torch.stack(scales, dim=-1).view(torch.uint8))
