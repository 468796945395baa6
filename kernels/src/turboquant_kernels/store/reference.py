"""The readable store: encode new keys and values, pack them, scatter them into the paged cache.

The CPU engine stores with it; GPU kernels are tested against it.
"""

import torch

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import PAGE_TOKENS
from turboquant_kernels.packing import Region, pack, pages_of


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
    """
    layout = codec.layout
    pages = pages_of(kv_cache, layout)
    used = (slot_mapping >= 0).nonzero().squeeze(-1)
    slot = slot_mapping[used].long()
    keys, values = codec.encode_keys(key[used]), codec.encode_values(value[used])

    block_size = kv_cache.shape[1]
    block, offset = slot // block_size, slot % block_size
    page, token = offset // PAGE_TOKENS, offset % PAGE_TOKENS

    def write(region: Region, data: torch.Tensor) -> None:
        """data: uint8 [used tokens, kv_heads, token_bytes]."""
        region.of(pages)[block, page, :, token] = data

    def write_codes(planes: tuple[Region, ...], codes: torch.Tensor, bits: int) -> None:
        for region, plane in zip(planes, pack(codes, bits), strict=True):
            write(region, plane)

    def write_scale(region: Region, scale: torch.Tensor) -> None:
        write(region, scale.unsqueeze(-1).view(torch.uint8))

    write_codes(layout.key_planes, keys.codes, codec.fmt.key_code_bits)
    write_codes(layout.value_planes, values.codes, codec.fmt.value_bits)
    write_scale(layout.key_scale, keys.scale)
    write_scale(layout.value_scale, values.scale)
    if layout.key_residual_signs is not None:
        write_codes((layout.key_residual_signs,), keys.residual_signs, bits=1)
        write_scale(layout.key_residual_norm, keys.residual_norm)
