"""Who owns the decode's buffers: one `DecodePlans` an engine, made with its first compressed layer.

Its layers find it through each other (`decode_plans_of`), it lives as long as they do, and two engines in
one process have one each. A plan is made for each shape of a batch and kept, since a captured graph writes
and reads its schedule. Layers run one after the other, so all plans share the memory of partial results; it
is reserved for the largest batch while vLLM measures memory (`warm_up`), before captured graphs hold its
address.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig

from turboquant_kernels.decode.plan import DecodePlan, DecodeShape, PartialResults


class DecodePlans:
    """One engine's decode plans, by shape."""

    def __init__(self) -> None:
        self._plans: dict[DecodeShape, DecodePlan] = {}
        self._partial_results: PartialResults | None = None
        self._leaders: dict[tuple[DecodeShape, bool], str] = {}

    def plan(self, shape: DecodeShape, device: torch.device) -> DecodePlan:
        """The plan of a shape, the same for all layers that have it."""
        if shape not in self._plans:
            self._plans[shape] = self.new_plan(shape, device)
        return self._plans[shape]

    def new_plan(self, shape: DecodeShape, device: torch.device) -> DecodePlan:
        """A plan over the engine's memory of partial results, which is not kept."""
        self._partial_results = self._partial_results or PartialResults(device)
        return DecodePlan(shape, device, partial_results=self._partial_results)

    def schedules(self, layer_name: str, shape: DecodeShape, draft: bool) -> bool:
        """Whether this layer fills the schedule for all layers of its shape, in batches of any size.

        The first layer that is called does, in each pass through the model and inside captured graphs,
        because sequence lengths change between passes. A draft model has captured graphs of its own, which
        must not rely on those of the target model, so its first layer fills the schedule too.
        """
        kind = replace(shape, num_seqs=0, query_len=0), draft
        return self._leaders.setdefault(kind, layer_name) == layer_name


def decode_plans_of(vllm_config: VllmConfig) -> DecodePlans:
    """The plans of an engine, found on one of its layers; new ones for the first."""
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        plans = getattr(getattr(layer, "impl", None), "decode_plans", None)
        if plans is not None:
            return plans  # type: ignore[no-any-return]
    return DecodePlans()
