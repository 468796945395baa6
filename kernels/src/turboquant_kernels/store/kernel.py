"""The store as one Triton launch: rotate, quantize, pack and write the keys and values of new tokens.

The same bytes as `store.reference` up to float32 rounding, with everything between load and store in
registers. A program takes a tile of consecutive tokens of one KV head, their keys or their values:
consecutive tokens mostly stand next to each other in a page, where their short rows fill whole sectors.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, Encoding
from turboquant_kernels.packing import anchors_of, pages_of
from turboquant_kernels.programmatic_launch import uses_pdl
from turboquant_kernels.rotation import device_projection
from turboquant_kernels.rotation_kernel import device_signs, load_vectors
from turboquant_kernels.store.encode_kernel import (
    NUM_WARPS,
    encode,
    page_of,
    specialization,
    write_keys,
    write_values,
)

_BLOCK_TOKENS = tl.constexpr(BLOCK_TOKENS)


def store(
    codec: Codec,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes the keys and values of new tokens into their slots of `kv_cache`, as `store.reference.store`.

    key, value: bf16, fp16 or fp32 [num_tokens, kv_heads, D], any strides of tokens and heads. kv_cache: uint8
    [num_blocks, block_size, kv_heads, slot_bytes], see `packing.pages_of`. slot_mapping: int32 or int64 [n].
    With anchors each key is stored less the anchor that the cache holds for its head and 128-token block.

    One launch whose grid follows from shapes, without synchronisation: it can be captured in a CUDA graph,
    once a first call has compiled it and copied the format's constants to the device. Raises ValueError where
    coordinates are not adjacent, slots do not fit 32 bits or the cache does not fit the format.
    """
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError("the coordinates of a key or value are not adjacent in memory")
    pages_of(kv_cache, codec.layout)  # raises where the cache does not fit the format
    if codec.fmt.anchor:
        anchors_of(kv_cache, codec.fmt, codec.head_dim)
    num_blocks, block_size, kv_heads, _ = kv_cache.shape
    if num_blocks * block_size >= 1 << 31:
        raise ValueError(f"slots of {num_blocks} blocks of {block_size} tokens do not fit 32 bits")
    num_tokens = slot_mapping.shape[0]
    if not num_tokens:
        return
    spec = specialization(codec.fmt, codec.head_dim)
    prod = codec.fmt.encoding is Encoding.PROD
    pdl = uses_pdl(key.device)
    grid = (triton.cdiv(num_tokens, spec.ROWS), kv_heads, 2)
    store_kernel[grid](
        key,
        value,
        kv_cache,
        slot_mapping,
        device_signs(codec.head_dim, codec.seed, key.device),
        device_projection(codec.head_dim, codec.seed, torch.float32, key.device) if prod else None,
        num_tokens,
        kv_heads,
        block_size,
        kv_cache.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        SPEC=spec,
        PDL=pdl,
        num_warps=NUM_WARPS,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["num_tokens", "kv_heads"])
def store_kernel(
    key,
    value,
    cache,  # uint8 [blocks, block_size / 16, kv_heads, page bytes], each block followed by its anchors
    slots,
    signs,
    projection,  # float32 [D, D] for prod, else None
    num_tokens,
    kv_heads,
    block_size,
    block_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    SPEC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (tiles of ROWS tokens, KV heads, keys and values)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0) * SPEC.ROWS + tl.arange(0, SPEC.ROWS)
    head = tl.program_id(1)
    valid = token < num_tokens
    slot = tl.load(slots + token, mask=valid, other=-1).to(tl.int32)
    if tl.program_id(2) == 0:
        vectors = key + token.to(tl.int64) * key_token_stride + head.to(tl.int64) * key_head_stride
        tile = load_vectors(vectors, valid, SPEC.D, SPEC.INNER)
        if SPEC.ANCHOR:
            block, offset = _block(cache, slot, block_size, block_stride)
            anchors = (block + block_size * kv_heads * SPEC.SLOT_BYTES).to(tl.pointer_type(tl.bfloat16))
            anchors += ((offset // _BLOCK_TOKENS).to(tl.int32) * kv_heads + head) * SPEC.D
            tile -= load_vectors(anchors, slot >= 0, SPEC.D, SPEC.INNER)
        encoded = encode(tile, signs, SPEC, SPEC.KEY)
        # Only now: until here nothing waits for the slots. Rows of padding are computed too, and not written.
        block, offset = _block(cache, slot, block_size, block_stride)
        page, row = page_of(block, offset, head, kv_heads, SPEC)
        write_keys(page, row, slot >= 0, encoded, projection, SPEC)
    else:
        vectors = value + token.to(tl.int64) * value_token_stride + head.to(tl.int64) * value_head_stride
        tile = load_vectors(vectors, valid, SPEC.D, SPEC.INNER)
        encoded = encode(tile, signs, SPEC, SPEC.VALUE)
        block, offset = _block(cache, slot, block_size, block_stride)
        page, row = page_of(block, offset, head, kv_heads, SPEC)
        write_values(page, row, slot >= 0, encoded, SPEC)


@triton.jit
def _block(cache, slot, block_size, block_stride):
    """Pointers to the blocks of slots and the tokens' offsets in them, uint32; meaningless for slot -1."""
    # Unsigned and 32 bits wide: a division of 64 bits would cost as much as the rotation.
    slot = slot.to(tl.uint32, bitcast=True)
    size = block_size.to(tl.uint32)
    index = slot // size
    return cache + index.to(tl.int64) * block_stride, slot - index * size
