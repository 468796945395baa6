"""How other kernels are called: that their functions take what they are given, on vLLM's own source.

Their extensions are CUDA's, so the functions are replaced by their signatures; the caches are real.
"""

import importlib.util
import inspect
import sys
import types

import pytest
import torch

from turboquant_kernels.bench import competitors
from turboquant_kernels.bench.rows import COMPETITORS, Shape

vllm = pytest.importorskip("vllm")

SHAPE = Shape(batch=2, context=40, q_heads=8, kv_heads=2, head_dim=64)
CPU = torch.device("cpu")


class Recorder:
    """Stands in for a function: takes the arguments that the function takes, and keeps them."""

    def __init__(self, function):
        self.signature = inspect.signature(function)
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append(self.signature.bind(*args, **kwargs).arguments)
        return torch.zeros(1)


@pytest.fixture
def flash_attention(monkeypatch):
    """vllm.vllm_flash_attn with recorders, since the package cannot be imported without its extension."""
    path = f"{vllm.__path__[0]}/vllm_flash_attn/flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("vllm.vllm_flash_attn.flash_attn_interface", path)
    interface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interface)
    stand_in = types.ModuleType("vllm.vllm_flash_attn")
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        setattr(stand_in, name, Recorder(getattr(interface, name)))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", stand_in)
    return stand_in


def test_each_competitor_of_a_row_can_be_prepared():
    assert competitors.PREPARE.keys() == COMPETITORS.keys()


@pytest.mark.parametrize(("name", "dtype"), [("fa3_bf16", torch.bfloat16), ("fa3_fp8", torch.float8_e4m3fn)])
def test_flash_attention_reads_a_paged_cache_of_its_dtype(name, dtype, flash_attention):
    competitors.PREPARE[name](SHAPE, CPU)()
    (call,) = flash_attention.flash_attn_varlen_func.calls
    assert call["fa_version"] == 3
    assert call["q"].dtype == call["k"].dtype == call["v"].dtype == dtype
    assert call["out"].dtype == torch.bfloat16
    assert call["k"].shape == (6, 16, 2, 64)
    assert sorted(call["block_table"].flatten().tolist()) == list(range(6))
    assert call["seqused_k"].tolist() == [40, 40]
    assert ("k_descale" in call) == (name == "fa3_fp8")
    (plan,) = flash_attention.get_scheduler_metadata.calls
    assert (plan["qkv_dtype"], plan["page_size"], plan["headdim"]) == (dtype, 16, 64)


def test_prefill_is_one_causal_call_over_context_and_chunk(flash_attention):
    competitors.prefill(SHAPE, 16, 40, CPU)()
    (call,) = flash_attention.flash_attn_varlen_func.calls
    assert call["q"].shape == (16, 8, 64)
    assert call["k"].shape == call["v"].shape == (56, 2, 64)
    assert (call["cu_seqlens_q"].tolist(), call["cu_seqlens_k"].tolist()) == ([0, 16], [0, 56])
    assert (call["causal"], call["fa_version"]) == (True, 3)


def test_vllms_turboquant_reads_its_4_bit_cache(monkeypatch):
    ops = pytest.importorskip("vllm.v1.attention.ops.triton_turboquant_decode")
    recorder = Recorder(ops.triton_turboquant_decode_attention)
    monkeypatch.setattr(ops, "triton_turboquant_decode_attention", recorder)
    competitors.PREPARE["vllm_turboquant"](SHAPE, CPU)()
    (call,) = recorder.calls
    assert call["kv_cache"].shape == (6, 16, 2, COMPETITORS["vllm_turboquant"].token_bytes(64))
    assert (call["mse_bits"], call["value_quant_bits"], call["norm_correction"]) == (4, 4, True)
    assert call["centroids"].shape == (16,)
    assert torch.allclose(call["Pi"] @ call["Pi"].T, torch.eye(64), atol=1e-6)
    slots = call["kv_cache"].numpy()
    for norm_or_scale in (slots[..., 32:34], slots[..., 66:68], slots[..., 68:70]):
        assert (abs(norm_or_scale.copy().view("float16") - 1.5) <= 0.5).all()


def test_vllms_int4_reads_its_cache_with_scales_between_the_codes(monkeypatch):
    ops = pytest.importorskip("vllm.v1.attention.ops.triton_unified_attention")
    recorder = Recorder(ops.unified_attention)
    monkeypatch.setattr(ops, "unified_attention", recorder)
    competitors.PREPARE["vllm_int4"](SHAPE, CPU)()
    (call,) = recorder.calls
    assert call["kv_quant_mode"].name == "INT4_PER_TOKEN_HEAD"
    assert call["k"].shape == (6, 16, 2, 36)
    slot_bytes = 2 * call["k"].shape[-1]
    assert slot_bytes == COMPETITORS["vllm_int4"].token_bytes(64)
    for cache, scale in (("k", "k_scale_cache"), ("v", "v_scale_cache")):
        inline = call[cache][..., 32:].contiguous().view(torch.float32).squeeze(-1)
        assert torch.equal(call[scale], inline)
        assert call[scale].data_ptr() == call[cache].data_ptr() + 32
    assert call["softmax_segm_output"].shape == (64, 8, 16, 64)
