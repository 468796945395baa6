"""Every patch of vLLM 0.25.1's internals: what, why, and nothing else.

vLLM 0.25.1 has no hook for a KV-cache format from outside, so `install` extends it in eight places. Each
function below that patches says which symbol, why, and what it leaves alone; `tests/test_vllm_0_25.py` fails
by name when a symbol changes. With none of our formats chosen every patch calls straight through.

| process | patched | so that |
|---|---|---|
| every | `CacheConfig.cache_dtype` and its copies | `--kv-cache-dtype tq-k4v4` is a valid value |
| front end | `Platform.check_and_update_config` | what cannot be served is refused before an engine starts |
| worker | `Platform.get_attn_backend_cls` | compressed layers get our attention backend |
| worker | `Attention.get_kv_cache_spec` | the engine lays pages out by their true size |
| front end, worker | `Platform._align_hybrid_block_size` | state pages of hybrids match compressed pages |
| engine core | `init_none_hash` | a page's identity has its format, seed and plan in it |
| worker | `extend_all_queries_by_N` of draft models | the host's lengths are those of the device |
| engine core, front end | the engine's ready message | metrics know the capacity of an uncompressed cache |
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

import msgspec
import pydantic.dataclasses
import torch
import vllm.config.cache
import vllm.utils.torch_utils
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from turboquant_kernels.formats import COMPRESSED_FORMATS, KVFormat
from turboquant_kernels.packing import PAGE_LAYOUT_VERSION
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.adapters.baseline import measure_capacity
from turboquant_runtime.adapters.engine_config import facts_of, layer_format, plan_of
from turboquant_runtime.capacity import REPORTED, CacheCapacity
from turboquant_runtime.configuration import (
    CACHE_DTYPES,
    RefusedConfiguration,
    check_servable,
    plain_layers,
)

BACKENDS = {
    "cpu": "turboquant_runtime.backends.cpu.CompressedCPUBackend",
    "cuda": "turboquant_runtime.backends.cuda.CompressedCUDABackend",
}
"""Our attention backend for each platform's device type."""


@cache
def install() -> None:
    """Patches the vLLM of this process; further calls do nothing."""
    accept_cache_dtypes()
    refuse_early(lambda vllm_config: report_capacity())
    route_attention(BACKENDS, _give_pages_their_true_size)
    align_hybrids()
    if "vllm.v1.engine.core" in sys.modules:
        report_capacity()


def accept_cache_dtypes() -> None:
    """Adds our format names to the values that `--kv-cache-dtype` and `CacheConfig` accept.

    Patched: the Literal `vllm.config.cache.CacheDType` with its three copies in the pydantic dataclass
    `CacheConfig` and its imports in `attention.selector` and `arg_utils`; the argparse entry made from it;
    `STR_DTYPE_TO_TORCH_DTYPE`, in which the name must lead to the pages' element type. The Literal is closed
    and checked at each of these places. From vLLM 0.33 on `register_kv_cache_dtype` replaces all of this.
    """
    names = tuple(fmt.name for fmt in COMPRESSED_FORMATS)
    config = vllm.config.cache.CacheConfig
    extended = Literal[(*get_args(vllm.config.cache.CacheDType), *names)]  # type: ignore[valid-type]
    config.__annotations__["cache_dtype"] = extended
    config.__dataclass_fields__["cache_dtype"].type = extended
    config.__pydantic_fields__["cache_dtype"].annotation = extended
    pydantic.dataclasses.rebuild_dataclass(config, force=True)
    vllm.utils.torch_utils.STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(names, torch.uint8))

    # A module that is not imported yet will find the extended Literal where it imports it from.
    for module_name in ("vllm.config.cache", "vllm.v1.attention.selector", "vllm.engine.arg_utils"):
        if module := sys.modules.get(module_name):
            module.CacheDType = extended
    if arguments := sys.modules.get("vllm.engine.arg_utils"):
        arguments._compute_kwargs.cache_clear()
        arguments._compute_kwargs(config)["cache_dtype"]["type"] = _cache_dtype_argument


def _cache_dtype_argument(value: str) -> str:
    """The `type` of the argparse entry: for a misspelt name of ours the near ones, not a list of forty."""
    if value.startswith("tq-"):
        try:
            KVFormat.parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return value


def refuse_early(accept: Callable[[VllmConfig], None]) -> None:
    """Refuses what cannot be served while vLLM checks its configuration: no engine, no weights yet.

    `accept` is called for an engine that has a format of ours and is not refused, and may still refuse it.

    Patched: `Platform.check_and_update_config`, the last step of `VllmConfig.__post_init__`, which only the
    process that makes the configuration runs (the others unpickle it). Layers that a plan leaves in the
    model's own dtype join `kv_cache_dtype_skip_layers` here, vLLM's own way to say so.
    """
    platform = type(current_platform)
    original = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        original(vllm_config)
        if vllm_config.model_config is None:  # a configuration of vLLM's own tests and tools
            return
        try:
            plan = plan_of(vllm_config)
            if plan is not None:
                check_servable(plan, facts_of(vllm_config))
                _keep_plain(plan, vllm_config.cache_config.kv_cache_dtype_skip_layers)
                accept(vllm_config)
        except RefusedConfiguration:
            _print_refusals_in_one_line()
            raise

    platform.check_and_update_config = classmethod(check_and_update_config)


def _keep_plain(plan: KVPlan, skip_layers: list[str]) -> None:
    """Adds a plan's plain layers to vLLM's list, once however often vLLM checks a configuration."""
    skip_layers.extend(str(index) for index in plain_layers(plan) if str(index) not in skip_layers)


def _print_refusals_in_one_line() -> None:
    """Makes an uncaught refusal end the process with its one line in place of a traceback through vLLM.

    Called only when a refusal is on its way, so that the hook of a process that is served stays untouched.
    """
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if isinstance(error, RefusedConfiguration):
            print(f"turboquant: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


def route_attention(backends: Mapping[str, str], size_pages: Callable[[], None]) -> None:
    """Gives layers with a compressed format our attention backend, all others the platform's own.

    backends: paths by device type. size_pages: the patch of layers' cache specs, made with the first
    compressed layer.

    Patched: `Platform.get_attn_backend_cls`. The CPU platform returns its one backend whatever is selected,
    and a selection by `--attention-backend` would capture the layers that keep the model's dtype too.
    """
    platform = type(current_platform)
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.kv_cache_dtype in CACHE_DTYPES:
            size_pages()
            lengthen_drafts_on_the_host()
            return valid_backend(backends[current_platform.device_type], attn_selector_config)
        return original(selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def valid_backend(path: str, attn_selector_config: Any) -> str:
    """The path of our backend; RefusedConfiguration where a layer is not for it."""
    if current_platform.is_cuda():
        reasons = resolve_obj_by_qualname(path).validate_configuration(
            device_capability=current_platform.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise RefusedConfiguration(
                f"{attn_selector_config.kv_cache_dtype}: {', '.join(reasons)}: "
                "start with --kv-cache-dtype auto"
            )
    return path


@cache
def _give_pages_their_true_size() -> None:
    """Makes a compressed layer's cache spec count the bytes that its format stores.

    Patched: `Attention.get_kv_cache_spec`, when the first compressed layer is made: importing the class at
    load would pull model code into every process. A spec has no field for bytes; its page is
    2 x head_size x element size per token and head. One-byte elements and head_size = slot_bytes / 2 give
    the true page on vLLM's own spec classes, whose exact type its block managers test.
    """
    from vllm.model_executor.layers.attention.attention import Attention

    original = Attention.get_kv_cache_spec

    def get_kv_cache_spec(self: Any, vllm_config: VllmConfig) -> Any:
        spec = original(self, vllm_config)
        if spec is None or self.kv_cache_dtype not in CACHE_DTYPES:
            return spec
        slot_bytes = slot_bytes_of(self, vllm_config)
        return replace(spec, head_size=slot_bytes // 2, head_size_v=slot_bytes // 2, dtype=torch.uint8)

    Attention.get_kv_cache_spec = get_kv_cache_spec


def slot_bytes_of(layer: Any, vllm_config: VllmConfig) -> int:
    """Bytes of a token and KV head of a compressed layer; RefusedConfiguration for uneven head sizes."""
    if layer.head_size_v != layer.head_size:
        raise RefusedConfiguration(
            f"{layer.layer_name}: values of another head size ({layer.head_size_v}) than keys "
            f"({layer.head_size}) cannot be compressed yet: start with --kv-cache-dtype auto"
        )
    return layer_format(vllm_config, layer.layer_name).slot_bytes(layer.head_size)


@cache
def lengthen_drafts_on_the_host() -> None:
    """Keeps the host's lengths of a draft model's sequences in step with the device's.

    Patched, when the first compressed layer is made: `extend_all_queries_by_N` in
    `vllm.v1.spec_decode.llm_base_proposer`, which gives a draft model one token more of each sequence than
    the target had. It adds them to the lengths on the device, not to `seq_lens_cpu_upper_bound`, by which
    prompts are read.
    """
    from vllm.v1.spec_decode import llm_base_proposer

    original = llm_base_proposer.extend_all_queries_by_N

    def extend_all_queries_by_N(common_attn_metadata: Any, N: int, *args: Any, **kwargs: Any) -> Any:
        extended = original(common_attn_metadata, N, *args, **kwargs)
        bound = common_attn_metadata.seq_lens_cpu_upper_bound
        return extended if bound is None else extended.replace(seq_lens_cpu_upper_bound=bound + N)

    llm_base_proposer.extend_all_queries_by_N = extend_all_queries_by_N


def align_hybrids() -> None:
    """Lets vLLM size a hybrid's state pages by the bytes that a compressed token takes.

    Patched: `Platform._align_hybrid_block_size`, which gives attention blocks of a hybrid model so many
    tokens that they reach the size of a linear-attention or Mamba state, and pads the state to it. It counts
    2 x head_size x element size for a token and head, so it is told a head size that makes this the slot's
    bytes; the largest of the plan's.
    """
    platform = type(current_platform)
    original = platform._align_hybrid_block_size

    def _align_hybrid_block_size(cls: type, vllm_config: VllmConfig, backend_cls: type) -> None:
        plan, model = plan_of(vllm_config), vllm_config.model_config
        if plan is None:
            original(vllm_config, backend_cls)
            return
        head_dim = model.get_head_size()
        slot_bytes = max(layer.slot_bytes(head_dim) for layer in plan.layers if layer.compressed)
        model.get_head_size = lambda: slot_bytes // 2
        try:
            original(vllm_config, backend_cls)
        finally:
            del model.get_head_size

    platform._align_hybrid_block_size = classmethod(_align_hybrid_block_size)


@cache
def report_capacity() -> None:
    """Sends the capacity of the uncompressed cache as this version of vLLM would lay it out."""
    send_capacity(measure_capacity)


def send_capacity(measure: Callable[[VllmConfig, list[dict[str, Any]], list[int]], CacheCapacity]) -> None:
    """Sends the capacity of the uncompressed cache from the engine core to the front end, where metrics are.

    Installed in the engine core's process, which has its module loaded when it loads plugins, and in a front
    end that has chosen one of our formats; workers need not import the engine for it.

    Patched: `vllm.v1.engine.core.get_kv_cache_configs`, the one place that sees all layers' specs and the
    memory; `EngineCoreReadyResponse` in the same module, the message that already carries vLLM's own
    capacity, which gets one field more; `MPClient._apply_ready_response`, which reads it. Readers of the
    message that do not know the field skip it.
    """
    from vllm.v1.engine import EngineCoreReadyResponse, core, core_client

    identify_pages()
    measured: list[CacheCapacity] = []
    lay_out: Callable[..., list[Any]] = core.get_kv_cache_configs
    apply_ready: Callable[..., None] = core_client.MPClient._apply_ready_response

    def get_kv_cache_configs(
        vllm_config: VllmConfig,
        kv_cache_specs: list[dict[str, Any]],
        available_memory: list[int],
        *groups: Any,
    ) -> list[Any]:
        # vLLM's own function may change the specs that it is given.
        specs = [dict(worker) for worker in kv_cache_specs]
        configs = lay_out(vllm_config, kv_cache_specs, available_memory, *groups)
        if plan_of(vllm_config) is not None:
            memory = available_memory
            if vllm_config.cache_config.num_gpu_blocks_override is not None:
                memory = [sum(tensor.size for tensor in config.kv_cache_tensors) for config in configs]
            measured[:] = [measure(vllm_config, specs, memory)]
        return configs

    @dataclass
    class ReadyResponse(EngineCoreReadyResponse):
        turboquant: CacheCapacity | None = field(default_factory=lambda: measured[0] if measured else None)

    class ReadyExtension(msgspec.Struct):
        turboquant: CacheCapacity | None = None

    def _apply_ready_response(self: Any, payload: bytes) -> None:
        apply_ready(self, payload)
        capacity = msgspec.msgpack.decode(payload, type=ReadyExtension).turboquant if payload else None
        if capacity is not None:
            REPORTED[self.vllm_config.instance_id] = capacity

    core.get_kv_cache_configs = get_kv_cache_configs
    core.EngineCoreReadyResponse = ReadyResponse
    core_client.MPClient._apply_ready_response = _apply_ready_response


def identify_pages() -> None:
    """Makes part of what identifies a page beyond this engine: each layer's format, the seed, the layout.

    Patched, in the engine core: the name `init_none_hash` in `vllm.v1.engine.core`, which sets the hash that
    every sequence's first block follows. Pages in host memory or on disk are found by these hashes; two
    engines that share them and differ in the plan so never read each other's bytes.
    """
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    lay_out, start_hashes = core.get_kv_cache_configs, core.init_none_hash
    plans: list[KVPlan] = []

    def get_kv_cache_configs(vllm_config: VllmConfig, *args: Any) -> list[Any]:
        plan = plan_of(vllm_config)
        plans[:] = [] if plan is None else [plan]
        return lay_out(vllm_config, *args)

    def init_none_hash(hash_fn: Callable[[Any], bytes]) -> None:
        start_hashes(hash_fn)
        for plan in plans:
            kv_cache_utils.NONE_HASH = page_identity(kv_cache_utils.NONE_HASH, plan, hash_fn)

    core.get_kv_cache_configs = get_kv_cache_configs
    core.init_none_hash = init_none_hash


def page_identity(start: bytes, plan: KVPlan, hash_fn: Callable[[Any], bytes]) -> bytes:
    """The hash before a sequence's first block: vLLM's own, and what its pages are stored by."""
    return hash_fn((start, PAGE_LAYOUT_VERSION, json.dumps(plan.to_dict(), sort_keys=True)))
