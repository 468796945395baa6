"""What it means that a kernel stored the same as `store.reference`."""

import dataclasses

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import ANCHOR_TOKENS, PAGE_TOKENS
from turboquant_kernels.packing import (
    KEY_RESIDUAL_NORM,
    KEY_SCALE,
    VALUE_SCALE,
    anchors_of,
    pages_of,
    row_of,
)
from turboquant_kernels.rotation import projection_matrix, rotation_matrix
from turboquant_kernels.store.reference import store

BOUNDARY = 1e-5
"""Standard deviations from a boundary between two levels, or from zero, within which rounding decides."""


def assert_same_as_reference(codec, key, value, slot_mapping, before, after):
    """Asserts that `after` is what the reference makes of the cache `before`, up to rounding; all on the CPU.

    Every byte of other slots is as it was. Codes are equal but where a coordinate lies within
    `BOUNDARY` of a boundary, signs of a projected residual but where the projection lies within ten times
    that of zero, and fp16 scales but for one unit in the last place (1% where what they follow from differs).
    Returns the number of bytes that differ.
    """
    tokens = (slot_mapping >= 0).nonzero().squeeze(-1)
    slot = slot_mapping[tokens].long()
    block, offset = slot // before.shape[1], slot % before.shape[1]
    if codec.fmt.anchor:
        anchors = anchors_of(before, codec.fmt, codec.head_dim)[block, offset // ANCHOR_TOKENS]
        key = key.float().index_put((tokens,), key[tokens].float() - anchors.float())
        codec = Codec(dataclasses.replace(codec.fmt, anchor=False), codec.head_dim, codec.seed)
    before, after = before.contiguous(), after.contiguous()
    expected = before.clone()
    store(codec, key, value, expected, slot_mapping)
    at = block, offset // PAGE_TOKENS, slice(None), offset % PAGE_TOKENS

    layout = codec.layout
    signs = [layout.key_residual_signs] if layout.key_residual_signs else []

    def rows(cache, region):
        """Bytes of the stored tokens: uint8 [tokens, kv_heads, token_bytes]."""
        return region.of(pages_of(cache, layout))[at]

    def codes(cache, regions, order):
        return order.unpack([rows(cache, region) for region in regions])

    def scales(cache):
        return rows(cache, layout.scales).view(torch.float16)

    outside = after.clone()
    for region in (*layout.key_planes, *layout.value_planes, *signs, layout.scales):
        region.rows(pages_of(outside, layout))[
            block, offset // PAGE_TOKENS, :, *row_of(offset % PAGE_TOKENS)
        ] = rows(before, region)
    assert torch.equal(outside, before), "bytes of other slots have changed"

    got, want = scales(after), scales(expected)
    for vectors, regions, order, place in (
        (key[tokens], layout.key_planes, codec.key_order, KEY_SCALE),
        (value[tokens], layout.value_planes, codec.value_order, VALUE_SCALE),
    ):
        differ = codes(after, regions, order) != codes(expected, regions, order)
        distance = _boundary_distance(_unit(vectors, codec.seed)[differ], order)
        assert (distance < BOUNDARY).all(), "codes differ"
        _assert_same_scales(got[..., place], want[..., place], differ.any(-1))
    if signs:
        key_codes = codes(expected, layout.key_planes, codec.key_order)
        # Another code or scale leaves another residual.
        other = (codes(after, layout.key_planes, codec.key_order) != key_codes).any(-1)
        other |= got[..., KEY_SCALE] != want[..., KEY_SCALE]
        projected = _projected_residual(codec, key[tokens], key_codes, want[..., KEY_SCALE])
        differ = codes(after, signs, codec.sign_order) != codes(expected, signs, codec.sign_order)
        assert (projected[differ & ~other[..., None]].abs() < 10 * BOUNDARY).all(), "residual signs differ"
        norm = want[..., KEY_RESIDUAL_NORM]
        rounding = norm < 1e-3 * want[..., KEY_SCALE]  # of the scale, where the levels fit a vector exactly
        _assert_same_scales(got[..., KEY_RESIDUAL_NORM], norm, other | rounding)
    return int((after != expected).sum())


def _unit(vectors, seed):
    """Rotated vectors of RMS 1, float64; zero where they cannot be stored."""
    vectors = vectors.double()
    largest = vectors.abs().amax(-1, keepdim=True)
    usable = (largest >= torch.finfo(torch.float32).tiny) & (largest < torch.inf)
    rotated = (
        torch.where(usable, vectors / largest, 0.0) @ rotation_matrix(vectors.shape[-1], seed).double().T
    )
    return rotated / rotated.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)


def _boundary_distance(coordinates, order):
    """Distance of each coordinate [n] to the nearest boundary, zero among them."""
    positive = codebook(order.bits, order.head_dim).boundaries
    boundaries = torch.cat([-positive.flip(0), torch.zeros(1), positive]).double()
    return (coordinates.unsqueeze(-1) - boundaries).abs().amin(-1)


def _projected_residual(codec, key, codes, scale):
    """What codes and scale leave of keys, projected; in standard deviations of the keys."""
    levels = codebook(codec.fmt.key_code_bits, codec.head_dim).levels.double()[codes.long()]
    rms = key.double().square().mean(-1).sqrt().clamp_min(1e-30)
    residual = _unit(key, codec.seed) - levels * (scale.double() / rms).unsqueeze(-1)
    return residual @ projection_matrix(codec.head_dim, codec.seed).double().T


def _assert_same_scales(got, want, other):
    """fp16 scales, positive or zero: neighbouring numbers have neighbouring bits."""
    steps = (got.contiguous().view(torch.int16).int() - want.contiguous().view(torch.int16).int()).abs()
    assert (steps[~other] <= 1).all(), "scales differ"
    assert torch.allclose(got[other].float(), want[other].float(), rtol=1e-2, atol=1e-7)
