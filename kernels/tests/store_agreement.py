"""What it means that a kernel stored the same as `store.reference`."""

import dataclasses

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import BLOCK_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    anchors_of,
    pages_of,
    row_of,
)
from turboquant_kernels.raw_block import OwnTokens
from turboquant_kernels.rotation import projection_matrix, rotation_matrix
from turboquant_kernels.store.reference import store, store_step

BOUNDARY = 1e-5
"""Standard deviations from a boundary between two levels, zero among them, within which rounding decides."""


def assert_same_as_step(codec, step, key, value, raw, before, after):
    """Asserts that `after` is what `store_step` makes of the cache `before`, up to rounding; all on the CPU.

    The pages of blocks that the step completes are the same as `assert_same_as_reference` says. Their
    anchors, raw tokens and every other byte, between blocks too, are the reference's.
    """
    own = OwnTokens.of(step, raw, before, key, value)
    expected = copy_of(before)
    store_step(codec, own, expected, raw)
    sequence, block = step.completed
    number = step.block_table[sequence, block].long()
    others = copy_of(after)
    others[number] = expected[number]
    assert torch.equal(memory_of(others), memory_of(expected)), "anchors, raw tokens or other bytes differ"
    if not len(number):
        return
    key, value = (vectors.flatten(0, 1) for vectors in own.block(sequence, block))
    slots = (number[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()
    assert_same_as_reference(codec, key, value, slots, expected, after)


def memory_of(kv_cache):
    """The blocks of a cache with what follows their pages: uint8 [num_blocks, bytes from block to block]."""
    stride = kv_cache.stride(0)
    return kv_cache.as_strided((len(kv_cache), stride), (stride, 1))


def copy_of(kv_cache):
    """A copy of a cache with what follows the pages of its blocks."""
    return memory_of(kv_cache).clone().as_strided(kv_cache.shape, kv_cache.stride())


def assert_same_as_reference(codec, key, value, slot_mapping, before, after):
    """Asserts that `after` is what the reference makes of the cache `before`, up to rounding; all on the CPU.

    Every byte of other slots is as it was. Codes are those of the reference but where a coordinate lies
    within `BOUNDARY` of a boundary. From these codes follow in float64, as `codec` defines them, the fp16
    scales, to one unit in the last place, and the signs of the projected residual, but where the projection
    is less than ten times `BOUNDARY`. Returns the number of bytes that differ from the reference's.
    """
    tokens = (slot_mapping >= 0).nonzero().squeeze(-1)
    slot = slot_mapping[tokens].long()
    block, offset = slot // before.shape[1], slot % before.shape[1]
    if codec.fmt.anchor:
        anchors = anchors_of(before, codec.fmt, codec.head_dim)[block, offset // BLOCK_TOKENS]
        key = key.float().index_put((tokens,), key[tokens].float() - anchors.float())
        codec = Codec(dataclasses.replace(codec.fmt, anchor=False), codec.head_dim, codec.seed)
    before, after = before.contiguous(), after.contiguous()
    expected = before.clone()
    store(codec, key, value, expected, slot_mapping)
    layout = codec.layout
    signs = [layout.key_residual_signs] if layout.key_residual_signs else []
    page, token = offset // PAGE_TOKENS, offset % PAGE_TOKENS

    def rows(cache, region):
        """Bytes of the stored tokens: uint8 [tokens, kv_heads, token_bytes]."""
        return region.of(pages_of(cache, layout))[block, page, :, token]

    def codes(cache, regions, order):
        return order.unpack([rows(cache, region) for region in regions])

    others = after.clone()
    for region in (*layout.key_planes, *layout.value_planes, *signs, layout.scales):
        region.rows(pages_of(others, layout))[block, page, :, *row_of(token)] = rows(before, region)
    assert torch.equal(others, before), "bytes of other slots have changed"

    scales = rows(after, layout.scales).view(torch.float16)
    for vectors, regions, order, which in (
        (key[tokens], layout.key_planes, codec.key_order, KEY_SCALE),
        (value[tokens], layout.value_planes, codec.value_order, VALUE_SCALE),
    ):
        unit, rms = _normalize(vectors, codec.seed)
        found = codes(after, regions, order)
        differ = found != codes(expected, regions, order)
        assert (_boundary_distance(unit[differ], order) < BOUNDARY).all(), "codes differ"
        levels = codebook(order.bits, order.head_dim).levels.double()[found.long()]
        overlap = (unit * levels).mean(-1)
        if which == VALUE_SCALE or not signs:
            _assert_half(scales[..., which], rms / overlap.clamp_min(1e-9))
            continue
        _assert_half(scales[..., which], rms * overlap / levels.square().mean(-1))
        used = levels * (scales[..., which].double() / rms.clamp_min(1e-38)).unsqueeze(-1)
        residual = unit - used
        norm = torch.linalg.vector_norm(residual, dim=-1) * rms
        _assert_half(scales[..., KEY_RESIDUAL_NORM], norm, slack=1e-5 * rms)
        projected = residual @ projection_matrix(codec.head_dim, codec.seed).double().T
        differ = (codes(after, signs, codec.sign_order) == 1) != (projected < 0)
        assert (projected[differ].abs() < 10 * BOUNDARY).all(), "signs of the residual differ"
    return int((after != expected).sum())


def _normalize(vectors, seed):
    """Rotated vectors of RMS 1, and the RMS, float64; zero where they cannot be stored."""
    vectors = vectors.double()
    largest = vectors.abs().amax(-1, keepdim=True)
    usable = (largest >= torch.finfo(torch.float32).tiny) & (largest < torch.inf)
    vectors = torch.where(usable, vectors, 0.0)
    rms = vectors.square().mean(-1, keepdim=True).sqrt()
    rotation = rotation_matrix(vectors.shape[-1], seed).double()
    return vectors / rms.clamp_min(1e-38) @ rotation.T, rms.squeeze(-1)


def _boundary_distance(coordinates, order):
    """Distance of each coordinate [n] to the nearest boundary, zero among them."""
    positive = codebook(order.bits, order.head_dim).boundaries
    boundaries = torch.cat([-positive.flip(0), torch.zeros(1), positive]).double()
    return (coordinates.unsqueeze(-1) - boundaries).abs().amin(-1)


def _assert_half(found, exact, slack=0.0):
    """Whether fp16 numbers are `exact`, saturated, to one unit in the last place."""
    exact = exact.clamp_max(torch.finfo(torch.float16).max)
    exponent = exact.clamp_min(torch.finfo(torch.float16).tiny).log2().floor()
    assert ((found.double() - exact).abs() <= (exponent - 10).exp2() + slack).all(), "scales differ"
