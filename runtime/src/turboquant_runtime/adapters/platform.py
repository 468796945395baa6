"""What vLLM asks of its platform, answered for compressed caches: what is served, by which backend, in
which pages.

vLLM loads one platform class a process. `platform_cpu` and `platform_cuda` derive it from `CompressedCaches`
and vLLM's own class, which answers every call where none of our formats is chosen.
"""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from turboquant_runtime.configuration import CACHE_DTYPES, RefusedConfiguration, check_servable

if TYPE_CHECKING:  # importing it asks for the platform
    from vllm.config import VllmConfig


class CompressedCaches:
    """Comes before a `vllm.platforms.interface.Platform` among a class's bases."""

    compressed_backend: ClassVar[str]
    """The path of the attention backend that reads compressed pages on this platform."""

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuses what cannot be served while vLLM checks its configuration: no engine, no weights yet.

        This is the last step of `VllmConfig.__post_init__`, which only the process that makes the
        configuration runs; the others unpickle it. Layers that a plan leaves in the model's own dtype join
        `kv_cache_dtype_skip_layers` here, vLLM's own way to say so.
        """
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if vllm_config.model_config is None:  # a configuration of vLLM's own tests and tools
            return
        from turboquant_runtime.adapters.engine_config import facts_of, plain_layer_indices, plan_of
        from turboquant_runtime.adapters.patches import patch_front_end
        from turboquant_runtime.adapters.tiers import deal_tier

        try:
            deal_tier(vllm_config)
            plan = plan_of(vllm_config)
            if plan is None:
                return
            check_servable(plan, facts_of(vllm_config))
        except RefusedConfiguration:
            _print_refusals_in_one_line()
            raise
        skipped = vllm_config.cache_config.kv_cache_dtype_skip_layers
        skipped.extend(
            str(index) for index in plain_layer_indices(vllm_config, plan) if str(index) not in skipped
        )
        patch_front_end()

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Our backend for layers with a compressed format; RefusedConfiguration where a layer is not for
        it."""
        if attn_selector_config.kv_cache_dtype not in CACHE_DTYPES:
            return super().get_attn_backend_cls(  # type: ignore[misc, no-any-return]
                selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads
            )
        from vllm.utils.import_utils import resolve_obj_by_qualname

        reasons = resolve_obj_by_qualname(cls.compressed_backend).validate_configuration(
            device_capability=cls.get_device_capability(),  # type: ignore[attr-defined]
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise RefusedConfiguration(
                f"{attn_selector_config.kv_cache_dtype}: {', '.join(reasons)}: "
                "start with --kv-cache-dtype auto"
            )
        return cls.compressed_backend

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Called in each worker between loading the model and asking its layers for their cache specs."""
        from turboquant_runtime.adapters import specs
        from turboquant_runtime.adapters.engine_config import plan_of
        from turboquant_runtime.adapters.patches import patch_worker

        if vllm_config.model_config is None or plan_of(vllm_config) is None:
            super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
            return
        if vllm_config.speculative_config and vllm_config.speculative_config.uses_draft_model():
            patch_worker()
        specs.put_formats_on_layers(vllm_config)
        super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
        specs.fit_plain_layers(vllm_config)
        specs.give_sequences_raw_blocks(vllm_config)

    @classmethod
    def _align_hybrid_block_size(cls, vllm_config: "VllmConfig", backend_cls: Any) -> None:
        """Sizes a hybrid's blocks, which must reach the size of a linear-attention or Mamba state, by the
        layer whose pages are largest: vLLM asks the first layer's backend, which may hold fewer or all
        bits."""
        from turboquant_runtime.adapters import specs
        from turboquant_runtime.adapters.engine_config import plan_of

        if plan_of(vllm_config) is not None:
            backend_cls = specs.largest_backend(vllm_config) or backend_cls
        super()._align_hybrid_block_size(vllm_config, backend_cls)  # type: ignore[misc]

    @classmethod
    def _align_heterogeneous_kv_block_size(cls, vllm_config: "VllmConfig", backend_cls: Any) -> None:
        """Leaves blocks beside layers in the model's own dtype to `specs.fit_plain_layers`: vLLM enlarges
        them in models that need no common page size, too, and fits no layer with full attention."""
        from turboquant_runtime.adapters.engine_config import plan_of

        if plan_of(vllm_config) is None:
            super()._align_heterogeneous_kv_block_size(vllm_config, backend_cls)  # type: ignore[misc]


def _print_refusals_in_one_line() -> None:
    """Makes an uncaught refusal end the process with its one line in place of a traceback through vLLM.

    Called only when a refusal is on its way, so that the hook of a process that is served stays untouched.
    """
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, RefusedConfiguration):
            print(f"turboquant: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook
