"""Hybrids: vLLM pads a linear-attention or Mamba state to the pages that compressed tokens really take."""

import pytest

from turboquant_kernels.formats import KVFormat
from turboquant_runtime import plugin
from turboquant_runtime.adapters.baseline import _PlainBackend

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("shape", ["QWEN3_NEXT", "FALCON_H1"])
@pytest.mark.parametrize("name", ["tq-k4v4", "auto"])
def test_a_state_fills_the_page_of_an_attention_block(dummy_model, shape: str, name: str) -> None:
    import vllm.engine.arg_utils
    from vllm.platforms import current_platform

    from turboquant_runtime.backends.cpu import CompressedCPUBackend

    plugin.register()
    model = str(dummy_model(shape))
    config = vllm.engine.arg_utils.EngineArgs(model=model, max_model_len=1024).create_engine_config()
    config.cache_config.cache_dtype, config.cache_config.block_size = name, 16
    config.cache_config.mamba_page_size_padded = None
    fmt = KVFormat.parse("bf16" if name == "auto" else name)
    backend = _PlainBackend if name == "auto" else CompressedCPUBackend.of_format(fmt)
    current_platform._align_hybrid_block_size(config, backend)

    head_dim, kv_heads = 128, 2
    block_size = config.cache_config.block_size
    assert config.cache_config.mamba_page_size_padded == kv_heads * fmt.page_bytes(head_dim, block_size)
    assert config.model_config.get_head_size() == head_dim
