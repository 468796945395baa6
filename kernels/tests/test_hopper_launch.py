"""Launches of the Hopper kernel: their programs fit a multiprocessor, and few tokens have small tiles."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ptx_machine.hopper_memory import shared_bytes
from triton.runtime.jit import serialize_specialization_data

from turboquant_kernels.codec import Codec
from turboquant_kernels.decode import plan as decode_plan
from turboquant_kernels.decode.hopper import HEAD_DIMS, launch_of
from turboquant_kernels.decode.plan import DecodePlan, DecodeShape
from turboquant_kernels.decode.variants import variants
from turboquant_kernels.formats import COMPRESSED_FORMATS, Encoding, KVFormat

PROGRAM_BYTES, MULTIPROCESSOR_BYTES, RESERVED_BYTES = 227 << 10, 228 << 10, 1 << 10
"""Shared memory of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications); the last
is what the system takes of each program's."""
REGISTERS, REGISTERS_OF_THREAD = 65536, 255

UNIFORM = [fmt for fmt in COMPRESSED_FORMATS if fmt.encoding is Encoding.MSE]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_programs_of_every_format_fit_a_multiprocessor(head_dim, rows, short):
    for fmt in UNIFORM:
        for anchor in (False, True):
            launch = launch_of(fmt, head_dim, rows, short)
            size = shared_bytes(replace(fmt, anchor=anchor), head_dim, launch)
            assert size <= PROGRAM_BYTES, (fmt.name, launch)
            assert launch.programs_per_sm * (size + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES, (
                fmt.name,
                launch,
            )
            threads = 32 * launch.num_warps * launch.programs_per_sm
            assert threads * (launch.max_registers or REGISTERS_OF_THREAD) <= REGISTERS + 512, launch


@pytest.mark.parametrize(
    ("fmt", "batch", "context", "window", "pages", "fused"),
    [
        ("tq-k3v3", 1, 32768, None, 1, False),
        ("tq-k3v3", 1, 131072, None, 2, False),
        ("tq-k3v3", 1, 131072, 4096, 1, False),
        ("tq-k3v3", 8, 32768, None, 2, False),
        ("tq-k3v3", 32, 4096, None, 2, False),
        ("tq-k3v3", 33, 4096, None, 2, True),
        ("tq-k3v3", 64, 512, None, 1, True),
        ("tq-k4v4", 1, 131072, None, 1, False),
    ],
)
def test_tiles_are_small_where_a_program_has_few(fmt, batch, context, window, pages, fused, monkeypatch):
    """32 query heads, 8 KV heads of 128; on 132 multiprocessors these have 66 splits at once."""
    own = plan_of(monkeypatch, fmt, 128, 32, batch, context, window)
    assert own.launch.pages == pages
    assert (own.counters is not None) == fused


def test_eight_rows_and_head_dim_256_have_small_tiles_too(monkeypatch):
    for head_dim, q_heads, context, pages in ((128, 64, 32768, 2), (128, 64, 131072, 4), (256, 16, 8192, 1)):
        assert plan_of(monkeypatch, "tq-k3v3", head_dim, q_heads, 1, context).launch.pages == pages


def plan_of(monkeypatch, fmt, head_dim, q_heads, batch, context, window=None):
    """Of 8 KV heads and blocks of 16 tokens, as an H200 would have it."""
    monkeypatch.setattr(decode_plan, "_multiprocessors", lambda _: 132)
    codec = Codec(KVFormat.parse(fmt), head_dim)
    kv_cache = torch.zeros(1, 16, 8, codec.fmt.slot_bytes(head_dim), dtype=torch.uint8)
    block_table = torch.zeros(batch, context // 16, dtype=torch.int32)
    shape = DecodeShape.of(codec, kv_cache, block_table, q_heads=q_heads, query_len=1, window=window)
    return DecodePlan(shape, torch.device("cpu"), path="hopper")


def test_hooks_that_watch_compilation_can_write_specializations_down():
    own = [variant for variant in variants() if variant.name.startswith("decode-hopper-")]
    assert own
    for variant in own:
        constants = {(0,): variant.constexprs["SPEC"]}
        written = serialize_specialization_data(
            "", {}, constants, {}, SimpleNamespace(), "", SimpleNamespace()
        )
        assert json.loads(written)["constant_vals"][0][0] == variant.constexprs["SPEC"].D
