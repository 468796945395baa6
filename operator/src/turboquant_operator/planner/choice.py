"""The decision: which KV format on how many GPUs, and why. Pure.

The fewest GPUs first, then the best quality tier that holds the asked capacity. `auto` chooses among the
tiers of `turboquant_kernels.formats` alone: memory that a compressed cache leaves over serves more sequences
and longer cached prefixes, so an uncompressed cache is never "enough" by itself; whoever wants one names
bf16 or fp8. The exceptions, each with its reason in the plan, are models that compression would hurt (key
bias) or cannot store (head_dim), which `auto` leaves in their own dtype.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turboquant_kernels.formats import (
    BF16,
    BLOCK_TOKENS,
    DEALT_LOAD_FORMATS,
    DEALT_QUANTIZATIONS,
    FP8,
    HEAD_DIMS,
    PAGE_TOKENS,
    QUALITIES,
    RAW_BLOCK_DEVICES,
    KVFormat,
    Tier,
    base_format,
    find_tier,
)
from turboquant_kernels.plans import KVPlan
from turboquant_operator.api.schema import parse_quantity
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import Alternative, Plan
from turboquant_operator.planner.accelerators import CPU, Accelerator, NodeGPUs, find_accelerators
from turboquant_operator.planner.engine import EngineSettings, engine_settings
from turboquant_operator.planner.explain import insufficient, why
from turboquant_operator.planner.facts import ModelFacts, with_dtype
from turboquant_operator.planner.identity import plan_hash
from turboquant_operator.planner.memory import cache_bytes, weight_bytes_per_gpu
from turboquant_operator.planner.options import Choice, Option
from turboquant_operator.planner.outcome import NoPlan, refused, unfit, unknown

LONG_CONTEXT_VARIABLE = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""Engine variable by which a user takes responsibility for a context beyond the model's own."""

_CPU_FP8_ELEMENTS = 32
"""vLLM 0.32.0 on CPU (v1/attention/backends/cpu_attn.py)."""

_MIN_COMPUTE_MAJOR = 8
"""Compute capability of GPUs whose engine serves compressed caches, before the dot."""

_TEXT_ONLY = """add --limit-mm-per-prompt={"image": 0} to engine.args for text alone"""


def make_plan(
    spec: TurboQuantDeploymentSpec,
    facts: ModelFacts,
    *,
    nodes: Iterable[NodeGPUs] | None = None,
    kv_plan: KVPlan | None = None,
    revision: str = "",
) -> Plan | NoPlan:
    """The plan for one object, or the condition that says why there is none.

    `nodes`: the cluster's GPU nodes, None where they may not be listed. `kv_plan`: the document that
    `spec.kvCache.planRef` names. `revision`: the commit that the facts were read from.
    """
    if problem := _check_layers(spec, facts, kv_plan):
        return problem
    context = _context_length(spec, facts)
    if isinstance(context, NoPlan):
        return context
    request = _Request(spec, facts, context, kv_plan, revision)
    if spec.accelerator.type == CPU:
        return _plan_on(None, request)
    kinds = find_accelerators(spec.accelerator.type, nodes)
    if isinstance(kinds, NoPlan):
        return kinds
    answers = [_plan_on(gpu, request) for gpu in kinds]
    plans = [answer for answer in answers if isinstance(answer, Plan)]
    # Kinds come smallest first, so among plans of equally many GPUs the smallest GPU wins. Where nothing
    # fits, the largest GPU's answer names the nearest thing that would.
    return min(plans, key=lambda plan: plan.gpus_per_replica) if plans else answers[-1]


@dataclass(frozen=True)
class _Request:
    """What is asked for, on whatever accelerator."""

    spec: TurboQuantDeploymentSpec
    facts: ModelFacts
    context_length: int
    kv_plan: KVPlan | None
    revision: str


def _check_layers(spec: TurboQuantDeploymentSpec, facts: ModelFacts, kv_plan: KVPlan | None) -> NoPlan | None:
    """What can be said of the asked formats before any memory is counted."""
    beyond = [layer for layer in spec.kv_cache.skip_layers if layer >= facts.layers]
    if beyond:
        return refused(
            "UnknownLayer",
            f"kvCache.skipLayers names layer {beyond[0]}; {facts.architecture} has layers 0 to "
            f"{facts.layers - 1}.",
        )
    if kv_plan is not None and len(kv_plan.layers) != facts.layers:
        return refused(
            "KVPlanMismatch",
            f"The KV plan has {len(kv_plan.layers)} layers and {facts.architecture} has {facts.layers}: "
            "make a plan for this model.",
        )
    if kv_plan is not None and (problem := _check_plan(kv_plan, _device(spec))):
        return problem
    wanted = kv_plan.layers if kv_plan else _named_formats(spec)
    if spec.accelerator.type == CPU and FP8 in wanted and facts.head_dim % _CPU_FP8_ELEMENTS:
        return refused(
            "FormatNotYetSupported",
            f"On cpu the engine stores fp8 only for heads of a multiple of {_CPU_FP8_ELEMENTS} elements, and "
            f"{facts.architecture} has {facts.head_dim}: use kvCache.format bf16 or auto.",
        )
    if facts.head_dim not in HEAD_DIMS and any(fmt.compressed for fmt in wanted):
        return refused(
            "FormatNotYetSupported",
            f"The compressed formats store heads of {', '.join(map(str, HEAD_DIMS))} elements and "
            f"{facts.architecture} has {facts.head_dim}: use kvCache.format bf16, fp8 or auto.",
        )
    return None


def _check_plan(kv_plan: KVPlan, device: str) -> NoPlan | None:
    """What the engine would refuse of a plan's layers."""
    if device not in RAW_BLOCK_DEVICES and any(fmt.anchor for fmt in kv_plan.layers):
        return refused("FormatNotYetSupported", "The KV plan has key anchors, which GPUs cannot serve yet.")
    if FP8 in kv_plan.layers:
        return refused(
            "FormatNotYetSupported",
            "The KV plan has fp8 layers, which cannot stand beside compressed ones: give them a compressed "
            "format, or 16 bits for both to keep the model's own dtype.",
        )
    if not any(fmt.compressed for fmt in kv_plan.layers):
        return refused("InvalidKVPlan", "The KV plan compresses no layer: use kvCache.format bf16 instead.")
    return None


def _check_gpu(gpu: Accelerator, facts: ModelFacts) -> NoPlan | None:
    """What the engine would refuse of a compressed cache on this GPU."""
    if gpu.compute_major is not None and gpu.compute_major < _MIN_COMPUTE_MAJOR:
        return refused(
            "UnsupportedAccelerator",
            f"Compressed caches need GPUs of compute capability {_MIN_COMPUTE_MAJOR}.0 or newer and those of "
            f"{gpu.name} have {gpu.compute_major}.x: use another accelerator.type, or kvCache.format bf16.",
        )
    if facts.dtype == "float32":
        return refused(
            "InvalidEngineArgument",
            "A compressed cache on GPUs needs a model in bfloat16 or float16, not float32: add "
            "--dtype=bfloat16 to engine.args, or use kvCache.format bf16.",
        )
    return None


def _named_formats(spec: TurboQuantDeploymentSpec) -> tuple[KVFormat, ...]:
    return () if spec.kv_cache.format == "auto" else (base_format(spec.kv_cache.format, _device(spec)),)


def _device(spec: TurboQuantDeploymentSpec) -> str:
    return "cpu" if spec.accelerator.type == CPU else "cuda"


def _tier_choice(
    spec: TurboQuantDeploymentSpec, facts: ModelFacts, tier: Tier, skip: Iterable[int]
) -> Choice:
    return Choice.of_tier(tier.on(_device(spec)), facts, skip)


def _context_length(spec: TurboQuantDeploymentSpec, facts: ModelFacts) -> int | NoPlan:
    asked, own = spec.capacity.context_length, facts.context_length
    if asked is None and own is None:
        return unknown(
            "MissingModelFacts",
            f"config.json of {facts.architecture} does not say how long a sequence may be: set "
            "capacity.contextLength.",
        )
    allowed = any(variable.name == LONG_CONTEXT_VARIABLE for variable in spec.engine.env)
    if asked is not None and own is not None and asked > own and not allowed:
        return refused(
            "ContextTooLong",
            f"capacity.contextLength {asked:,} is more than the {own:,} tokens that {facts.architecture} can "
            f"serve: lower it, or set {LONG_CONTEXT_VARIABLE}=1 in engine.env at your own risk.",
        )
    return asked or own or 0


def _choices(
    spec: TurboQuantDeploymentSpec, facts: ModelFacts, settings: EngineSettings, kv_plan: KVPlan | None
) -> tuple[list[Choice], list[str]] | NoPlan:
    """Formats to try, best first, and the reasons that led to them."""
    skip = spec.kv_cache.skip_layers
    images = facts.bidirectional_images and settings.images
    if images and any(fmt.compressed for fmt in (kv_plan.layers if kv_plan else _named_formats(spec))):
        return refused(
            "UnsupportedAttention",
            f"In {facts.architecture} the tokens of an image see each other in both directions, which a "
            f"compressed cache cannot serve yet: {_TEXT_ONLY}, or use kvCache.format bf16 or fp8.",
        )
    if kv_plan is not None:
        layers = tuple(BF16 if i in skip else fmt for i, fmt in enumerate(kv_plan.layers))
        return [Choice(_most_common(kv_plan).name, layers)], ["kvCache.planRef names the bits of each layer."]
    if named := _named_formats(spec):
        name = spec.kv_cache.format
        tier = find_tier(name)
        choice = _tier_choice(spec, facts, tier, skip) if tier else Choice.uniform(named[0], facts, skip)
        reasons = [f"kvCache.format asks for {name}."]
        if named[0].compressed and facts.key_bias and not (tier and _bits_are_dealt(spec, facts)):
            reasons.append(
                f"Warning: {facts.architecture} adds a bias to its keys, which the same bits in every layer "
                "store badly. Expect a loss of quality and compare with bf16 before relying on it."
            )
        if named[0] == FP8 and spec.accelerator.type == CPU:
            reasons.append("Warning: the engine starts with fp8 only on CPUs with AVX-512 or AMX.")
        return [choice], reasons
    if facts.key_bias and not _bits_are_dealt(spec, facts):
        return [Choice.uniform(BF16, facts)], [
            f"{facts.architecture} adds a bias to its keys, which wants more bits in some layers than in "
            "others, and the engine deals none beside sliding windows, nor by weights that it cannot read: "
            "auto keeps its cache in the model's own dtype. Name a format to compress it anyway."
        ]
    if images:
        return [Choice.uniform(BF16, facts)], [
            f"In {facts.architecture} the tokens of an image see each other in both directions, which a "
            "compressed cache cannot serve yet: auto keeps its cache in the model's own dtype. To compress "
            f"it, {_TEXT_ONLY}."
        ]
    if facts.head_dim not in HEAD_DIMS:
        return [Choice.uniform(BF16, facts)], [
            f"No compressed format stores heads of {facts.head_dim} elements: auto keeps the cache in the "
            "model's own dtype."
        ]
    qualities = list(QUALITIES)
    allowed = qualities[: qualities.index(spec.kv_cache.quality) + 1]
    return [_tier_choice(spec, facts, QUALITIES[name], skip) for name in allowed], []


def _bits_are_dealt(spec: TurboQuantDeploymentSpec, facts: ModelFacts) -> bool:
    """Whether the engine can give layers bits of their own in a tier: it reads the model's weights, and the
    layers need not share pages of one size."""
    loader = re.search(r"--load[-_]format[= ](\S+)", " ".join(spec.engine.args))
    return (
        not facts.shares_page_size
        and facts.quantization in DEALT_QUANTIZATIONS
        and (loader is None or loader[1] in DEALT_LOAD_FORMATS)
    )


def _most_common(kv_plan: KVPlan) -> KVFormat:
    """The compressed format that `--kv-cache-dtype` names beside a plan of layers."""
    compressed = [fmt for fmt in kv_plan.layers if fmt.compressed]
    return max(compressed, key=lambda fmt: (compressed.count(fmt), fmt.key_bits, fmt.value_bits))


def _tensor_sizes(
    spec: TurboQuantDeploymentSpec, facts: ModelFacts, gpu: Accelerator | None
) -> Sequence[int] | NoPlan:
    """Tensor-parallel sizes to try, smallest first; all GPUs of a replica are on one node."""
    if gpu is None:
        return [1]
    pipeline, asked = spec.parallelism.pipeline, spec.parallelism.tensor
    most = gpu.gpus_per_node // pipeline
    if most < (1 if asked == "auto" else asked):
        wanted = f"parallelism asks for {pipeline if asked == 'auto' else asked * pipeline} GPUs"
        return unfit(
            "TooFewGPUs",
            f"{wanted}, and a replica runs on one node: those with {gpu.name} have {gpu.gpus_per_node}.",
        )
    possible = [size for size in range(1, most + 1) if _indivisible(facts, size) is None]
    if asked == "auto":
        return possible
    if reason := _indivisible(facts, asked):
        return refused(
            "UnsupportedTensorParallelSize",
            f"parallelism.tensor {asked} is not possible for {facts.architecture}: {reason}. Possible: "
            f"{', '.join(map(str, possible))}.",
        )
    return [asked]


def _indivisible(facts: ModelFacts, tensor: int) -> str | None:
    """Why the engine cannot split this model over `tensor` GPUs, if so."""
    if facts.attention_heads % tensor:
        return f"its {facts.attention_heads} attention heads do not divide by it"
    if facts.key_value_heads % tensor and tensor % facts.key_value_heads:
        return f"its {facts.key_value_heads} KV heads neither divide by it nor divide it"
    if facts.intermediate_size and facts.intermediate_size % tensor:
        return f"its MLP width {facts.intermediate_size} does not divide by it"
    return None


def _plan_on(gpu: Accelerator | None, request: _Request) -> Plan | NoPlan:
    """The plan on one kind of GPU, or on cpu (None)."""
    spec = request.spec
    settings = engine_settings(spec.engine.args, gpu, request.context_length)
    if isinstance(settings, NoPlan):
        return settings
    facts = with_dtype(request.facts, settings.dtype or request.facts.dtype)
    if gpu is None and spec.kv_cache.memory is None:
        return unknown("CacheMemoryUnknown", "accelerator.type cpu needs kvCache.memory, for example 4Gi.")
    if gpu is not None and facts.weight_bytes is None:
        return unknown(
            "MissingModelFacts",
            f"The sizes of the weights of {facts.architecture} could not be read: set "
            "model.architecture.weightBytes.",
        )
    sizes = _tensor_sizes(spec, facts, gpu)
    if isinstance(sizes, NoPlan):
        return sizes
    candidates = _choices(spec, facts, settings, request.kv_plan)
    if isinstance(candidates, NoPlan):
        return candidates
    choices, reasons = candidates
    compresses = any(fmt.compressed for choice in choices for fmt in choice.formats)
    if gpu is not None and compresses and (problem := _check_gpu(gpu, facts)):
        return problem
    unit = BLOCK_TOKENS if settings.raw_block else PAGE_TOKENS
    if compresses and settings.block_tokens % unit:
        return refused(
            "InvalidEngineArgument",
            f"engine.args: --block-size {settings.block_tokens} is not a multiple of {unit}, the tokens of a "
            "compressed block: leave it out or choose a multiple.",
        )

    def option(choice: Choice, tensor: int) -> Option:
        memory = _cache_memory(spec, gpu, facts, settings, tensor)
        return Option(
            choice, facts, settings, request.context_length, tensor, spec.parallelism.pipeline, memory
        )

    options = [option(choice, tensor) for tensor in sizes for choice in choices]
    tiers = [_tier_choice(spec, facts, tier, spec.kv_cache.skip_layers) for tier in QUALITIES.values()]
    if facts.head_dim not in HEAD_DIMS:
        tiers = []
    wanted = spec.capacity.concurrent_sequences
    chosen = next((candidate for candidate in options if candidate.sequences >= wanted), None)
    if chosen is None:
        lower = [option(choice, sizes[-1]) for choice in tiers]
        return insufficient(gpu, options, wanted, next((o for o in lower if o.sequences >= wanted), None))
    baseline = option(Choice.uniform(BF16, facts), chosen.tensor)
    compared = [option(c, chosen.tensor) for c in (baseline.choice, Choice.uniform(FP8, facts), *tiers)]
    compared += [option(chosen.choice, size) for size in sizes if size != chosen.tensor]
    reasons = [
        *reasons,
        *why(gpu, chosen, baseline, options, wanted, spec.parallelism.tensor != "auto"),
    ]
    others = [
        other
        for other in compared
        if (other.choice.name, other.tensor) != (chosen.choice.name, chosen.tensor)
    ]
    return _assemble(gpu, request, chosen, baseline, others, reasons)


def _cache_memory(
    spec: TurboQuantDeploymentSpec,
    gpu: Accelerator | None,
    facts: ModelFacts,
    settings: EngineSettings,
    tensor: int,
) -> int:
    """Bytes for the cache on one device; `kvCache.memory` wins where the GPU has that much."""
    asked = None if spec.kv_cache.memory is None else parse_quantity(spec.kv_cache.memory)
    if gpu is None:
        return asked or 0
    percent = spec.engine.gpu_memory_utilization_percent if asked is None else 100
    free = cache_bytes(gpu, percent, facts, settings, tensor, spec.parallelism.pipeline)
    if asked is None:
        return free
    return asked if asked <= free else free - asked


def _assemble(
    gpu: Accelerator | None,
    request: _Request,
    chosen: Option,
    baseline: Option,
    others: Sequence[Option],
    reasons: Sequence[str],
) -> Plan:
    wanted = request.spec.capacity.concurrent_sequences
    layers = len(chosen.choice.formats)
    return Plan(
        format=chosen.choice.name,
        key_bits=round(sum(fmt.key_bits for fmt in chosen.choice.formats) / layers),
        value_bits=round(sum(fmt.value_bits for fmt in chosen.choice.formats) / layers),
        tensor_parallel_size=chosen.tensor,
        pipeline_parallel_size=chosen.pipeline,
        accelerator=CPU if gpu is None else gpu.name,
        gpus_per_replica=0 if gpu is None else chosen.devices,
        context_length=chosen.context_length,
        weightBytesPerGPU=weight_bytes_per_gpu(
            chosen.facts.weight_bytes or 0, chosen.tensor, chosen.pipeline
        ),
        kv_bytes_per_token=chosen.bytes_per_token,
        baseline_kv_bytes_per_token=baseline.bytes_per_token,
        baseline_tokens=baseline.tokens,
        predicted_tokens=chosen.tokens,
        alternatives=tuple(
            Alternative(
                format=other.choice.name,
                tensor_parallel_size=other.tensor,
                predicted_tokens=other.tokens,
                fits=other.sequences >= wanted,
            )
            for other in others
        ),
        reasons=tuple(reasons),
        hash=plan_hash(request.spec, chosen, gpu.name if gpu else CPU, request.kv_plan, request.revision),
    )
