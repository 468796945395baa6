"""Reads names and arguments out of a vLLM wheel, to hold an adapter to a version that is not installed.

    python runtime/tests/vllm_symbols.py vllm-0.33.0-....whl > runtime/tests/vllm_0_33.json

The result has the arguments of each function and the fields of each class of `SYMBOLS`; null for a name that
a module only has to have.
"""

import ast
import json
import sys
from pathlib import Path
from zipfile import ZipFile

SYMBOLS = (
    "config/cache.py register_kv_cache_dtype",
    "config/cache.py KVCacheDTypeHandler.torch_dtype",
    "config/cache.py KVCacheDTypeHandler.quant_mode",
    "platforms/cpu.py CpuPlatform.check_and_update_config",
    "platforms/cpu.py CpuPlatform.get_attn_backend_cls",
    "platforms/cuda.py CudaPlatformBase.check_and_update_config",
    "platforms/cuda.py CudaPlatformBase.get_attn_backend_cls",
    "model_executor/layers/attention/attention.py Attention.get_kv_cache_spec",
    "model_executor/models/utils.py extract_layer_index",
    "v1/attention/selector.py AttentionSelectorConfig",
    "v1/attention/backend.py AttentionBackend.get_supported_kernel_block_sizes",
    "v1/attention/backend.py AttentionBackend.customize_spec",
    "v1/attention/backend.py AttentionBackend.supported_kv_cache_layouts",
    "v1/attention/backend.py AttentionBackend.supports_sliding_window",
    "v1/attention/backend.py AttentionBackend.validate_configuration",
    "v1/attention/backend.py AttentionImpl.__init__",
    "v1/attention/backend.py AttentionImpl.forward",
    "v1/attention/backend.py AttentionMetadataBuilder.__init__",
    "v1/attention/backend.py AttentionMetadataBuilder.build",
    "v1/attention/backend.py CommonAttentionMetadata",
    "v1/kv_cache_interface.py AttentionSpec",
    "v1/kv_cache_interface.py KVQuantMode",
    "v1/kv_cache_layout.py KVCacheLayout",
    "v1/core/kv_cache_planning.py get_kv_cache_groups",
    "v1/core/kv_cache_planning.py get_kv_cache_config_from_groups",
    "v1/core/kv_cache_utils.py get_kv_cache_capacity",
    "v1/core/kv_cache_utils.py init_none_hash",
    "v1/core/kv_cache_utils.py NONE_HASH",
    "v1/engine/core.py EngineCoreReadyResponse",
    "v1/engine/core.py get_kv_cache_configs",
    "v1/engine/core.py init_none_hash",
    "v1/core/kv_cache_planning.py get_kv_cache_configs",
    "v1/engine/core_client.py MPClient._apply_ready_response",
    "v1/spec_decode/llm_base_proposer.py extend_all_queries_by_N",
    "v1/spec_decode/utils.py extend_all_queries_by_N",
    "v1/metrics/loggers.py StatLoggerBase.__init__",
    "v1/metrics/loggers.py StatLoggerBase.record",
)
"""What `adapters.vllm_0_33` and the modules that it shares with 0.25 use: path in the package, name."""


def read(wheel: Path) -> dict[str, list[str] | None]:
    """Arguments or fields by symbol. Raises KeyError for one that the wheel does not have."""
    with ZipFile(wheel) as files:
        sources = {symbol.split()[0] for symbol in SYMBOLS}
        modules = {path: ast.parse(files.read(f"vllm/{path}")) for path in sources}
    return {symbol: _describe(modules[symbol.split()[0]], symbol.split()[1]) for symbol in SYMBOLS}


def _describe(module: ast.Module, name: str) -> list[str] | None:
    node: ast.AST = module
    for part in name.split("."):
        node = _named(node, part)
    if isinstance(node, ast.FunctionDef):
        return [argument.arg for argument in node.args.args]
    if isinstance(node, ast.ClassDef):
        return [target for statement in node.body for target in _targets(statement)]
    return None


def _named(parent: ast.AST, name: str) -> ast.AST:
    for node in parent.body:  # type: ignore[attr-defined]
        imported = isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}
        if getattr(node, "name", None) == name or name in _targets(node) or imported:
            return node
    raise KeyError(name)


def _targets(node: ast.AST) -> list[str]:
    """Names that an assignment gives a value or a type."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1])), indent=1))
