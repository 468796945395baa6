"""Every patch of vLLM 0.32's internals: what, why, and nothing else.

For most of what compressed caches need vLLM has a place: its platform (`platform`), its backends and their
specs (`specs`). What has none is patched here, in four places, by process. `tests/test_patches.py` fails by
name when a symbol changes. With none of our formats chosen every patch calls straight through.

| process | patched | so that |
|---|---|---|
| every | `CacheConfig.cache_dtype` and its copies | `--kv-cache-dtype tq-k4v4` is a valid value |
| worker | how model runners lengthen a draft model's batch | the host's lengths are those of the device |
| engine core | `init_none_hash` | a page's identity has its format, seed and plan in it |
| engine core, front end | the engine's ready message | metrics know the capacity of an uncompressed cache |
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import msgspec
import pydantic.dataclasses
import torch
import vllm.config.cache
import vllm.utils.torch_utils
from vllm.config import VllmConfig

from turboquant_kernels.formats import base_format
from turboquant_kernels.packing import PAGE_LAYOUT_VERSION
from turboquant_kernels.plans import KVPlan
from turboquant_runtime.adapters.engine_config import plan_of
from turboquant_runtime.capacity import REPORTED, CacheCapacity
from turboquant_runtime.configuration import CACHE_DTYPES


@cache
def install() -> None:
    """Patches the vLLM of this process, called when it loads plugins; further calls do nothing."""
    _accept_cache_dtypes()
    if "vllm.v1.engine.core" in sys.modules:
        _patch_engine_core()


def patch_front_end() -> None:
    """Called in a front end that has chosen one of our formats; it may hold the engine core too."""
    _patch_engine_core()


@cache
def patch_worker() -> None:
    """Called in a worker that has loaded a draft model."""
    _lengthen_drafts_on_the_host()


# Every process


def _accept_cache_dtypes() -> None:
    """Adds our format names to the values that `--kv-cache-dtype` and `CacheConfig` accept.

    Patched: the Literal `vllm.config.cache.CacheDType` with its copies in the pydantic dataclass
    `CacheConfig` and its imports in `attention.selector` and `arg_utils`; the argparse entry made from it;
    `STR_DTYPE_TO_TORCH_DTYPE`, in which the name must lead to the pages' element type. The Literal is
    closed and checked at each of these places. From vLLM 0.33 on `register_kv_cache_dtype` replaces all of
    this.
    """
    names = tuple(sorted(CACHE_DTYPES))
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
            base_format(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return value


# Worker


def _lengthen_drafts_on_the_host() -> None:
    """Keeps the host's lengths of a draft model's sequences in step with the device's.

    Patched, one for each of vLLM's model runners: `extend_all_queries_by_N` in
    `vllm.v1.spec_decode.llm_base_proposer` and `StandaloneARSpeculator._build_attn_metadata`. By these a
    draft model gets one token more of each sequence than the target had. Both add it to the lengths on the
    device, not to `seq_lens_cpu_upper_bound`, by which prompts are read.
    """
    from vllm.v1.spec_decode import llm_base_proposer
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    extend = llm_base_proposer.extend_all_queries_by_N
    build = StandaloneARSpeculator._build_attn_metadata

    def extend_all_queries_by_N(common_attn_metadata: Any, N: int, *args: Any, **kwargs: Any) -> Any:
        extended = extend(common_attn_metadata, N, *args, **kwargs)
        bound = common_attn_metadata.seq_lens_cpu_upper_bound
        return extended if bound is None else extended.replace(seq_lens_cpu_upper_bound=bound + N)

    def _build_attn_metadata(self: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        # Later steps, of one token each, are asked for with the number that counts the additional token.
        return build(self, *args, step=step or self.num_extra_query_per_req, **kwargs)

    llm_base_proposer.extend_all_queries_by_N = extend_all_queries_by_N
    StandaloneARSpeculator._build_attn_metadata = _build_attn_metadata


# Engine core and front end


@dataclass(frozen=True)
class _Engine:
    """What an engine core has laid out, for what it does next."""

    plan: KVPlan | None
    skipped_layers: tuple[str, ...] = ()
    capacity: CacheCapacity | None = None


@cache
def _patch_engine_core() -> None:
    """Identifies pages and reports capacities.

    Both need what `get_kv_cache_configs` is given, the one place that sees all layers' specs and the
    memory; what follows in an engine core's start reads it from `laid_out`. An engine core is made in one
    thread.
    """
    from vllm.v1.engine import core

    laid_out: list[_Engine] = []
    lay_out: Callable[..., list[Any]] = core.get_kv_cache_configs

    def get_kv_cache_configs(
        vllm_config: VllmConfig,
        kv_cache_specs: list[dict[str, Any]],
        available_memory: list[int],
        *groups: Any,
    ) -> list[Any]:
        # vLLM's own function may change the specs that it is given.
        specs = [dict(worker) for worker in kv_cache_specs]
        configs = lay_out(vllm_config, kv_cache_specs, available_memory, *groups)
        plan = plan_of(vllm_config)
        if plan is None:
            laid_out[:] = [_Engine(None)]
            return configs
        from turboquant_runtime.adapters.baseline import measure_capacity

        memory = available_memory
        if vllm_config.cache_config.num_gpu_blocks_override is not None:
            memory = [sum(tensor.size for tensor in config.kv_cache_tensors) for config in configs]
        skipped = tuple(sorted(vllm_config.cache_config.kv_cache_dtype_skip_layers))
        laid_out[:] = [_Engine(plan, skipped, measure_capacity(vllm_config, specs, memory))]
        return configs

    core.get_kv_cache_configs = get_kv_cache_configs
    _identify_pages(laid_out)
    _report_capacity(laid_out)


def _identify_pages(laid_out: list[_Engine]) -> None:
    """Makes part of what identifies a page beyond this engine: each layer's format, the seed, the layout.

    Patched: the name `init_none_hash` in `vllm.v1.engine.core`, which sets the hash that every sequence's
    first block follows. Pages in host memory or on disk are found by these hashes; two engines that share
    them and differ in the plan, or in the layers that keep the model's dtype, so never read each other's
    bytes.
    """
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core

    start_hashes = core.init_none_hash

    def init_none_hash(hash_fn: Callable[[Any], bytes]) -> None:
        start_hashes(hash_fn)
        for engine in laid_out:
            if engine.plan is not None:
                kv_cache_utils.NONE_HASH = page_identity(
                    kv_cache_utils.NONE_HASH, engine.plan, engine.skipped_layers, hash_fn
                )

    core.init_none_hash = init_none_hash


def page_identity(
    start: bytes, plan: KVPlan, skipped_layers: Sequence[str], hash_fn: Callable[[Any], bytes]
) -> bytes:
    """The hash before a sequence's first block: vLLM's own, and what its pages are stored by."""
    formats = json.dumps(plan.to_dict(), sort_keys=True)
    return hash_fn((start, PAGE_LAYOUT_VERSION, formats, tuple(skipped_layers)))


def _report_capacity(laid_out: list[_Engine]) -> None:
    """Sends the capacity of the uncompressed cache from the engine core to the front end, where metrics are.

    Patched: `EngineCoreReadyResponse` in `vllm.v1.engine.core`, the message that already carries vLLM's own
    capacity, which gets one field more; `MPClient._apply_ready_response`, which reads it. Readers of the
    message that do not know the field skip it.
    """
    from vllm.v1.engine import EngineCoreReadyResponse, core, core_client

    apply_ready: Callable[..., None] = core_client.MPClient._apply_ready_response

    @dataclass
    class ReadyResponse(EngineCoreReadyResponse):
        turboquant: CacheCapacity | None = field(
            default_factory=lambda: laid_out[0].capacity if laid_out else None
        )

    class ReadyExtension(msgspec.Struct):
        turboquant: CacheCapacity | None = None

    def _apply_ready_response(self: Any, payload: bytes) -> None:
        apply_ready(self, payload)
        capacity = msgspec.msgpack.decode(payload, type=ReadyExtension).turboquant if payload else None
        if capacity is not None:
            REPORTED[self.vllm_config.instance_id] = capacity

    core.EngineCoreReadyResponse = ReadyResponse
    core_client.MPClient._apply_ready_response = _apply_ready_response
