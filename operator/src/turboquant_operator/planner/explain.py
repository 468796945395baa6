"""The planner's sentences: why this plan, and what would fit where nothing does."""

from collections.abc import Sequence

from turboquant_kernels.formats import BLOCK_TOKENS, KEY_BITS, Tier, find_tier
from turboquant_operator.planner.accelerators import Accelerator
from turboquant_operator.planner.facts import ModelFacts
from turboquant_operator.planner.memory import weight_bytes_per_gpu
from turboquant_operator.planner.options import Option
from turboquant_operator.planner.outcome import NoPlan, unfit

GIB = 2**30


def gib(size: int) -> str:
    """Bytes as people read them: 14.96 GiB."""
    return f"{size / GIB:.2f} GiB"


def gpus(count: int) -> str:
    """1 GPU, 2 GPUs."""
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def place(gpu: Accelerator | None, option: Option) -> str:
    """Where an option runs."""
    return "cpu" if gpu is None else f"{gpus(option.devices)} of {gpu.name}"


def why(
    gpu: Accelerator | None,
    chosen: Option,
    baseline: Option,
    tried: Sequence[Option],
    wanted: int,
    asked_tensor: bool,
) -> list[str]:
    """Reasons of a plan that fits, the decision first."""
    sentences = [
        f"{chosen.choice.name} on {place(gpu, chosen)} holds {chosen.tokens:,} tokens, {chosen.sequences} "
        f"sequences of {chosen.context_length:,} (asked for: {wanted})."
    ]
    before = tried[: tried.index(chosen)]
    if asked_tensor:
        sentences.append(f"parallelism.tensor asks for {chosen.tensor}.")
    elif fewer := [option for option in before if option.tensor < chosen.tensor]:
        best = max(fewer, key=lambda option: option.sequences)
        short = (
            f"at most {best.sequences} such sequences on {gpus(best.devices)} ({best.choice.name})"
            if best.memory > 0
            else f"the weights leave no memory on {gpus(best.devices)}"
        )
        sentences.append(f"Fewer GPUs do not suffice: {short}.")
    if better := [option for option in before if option.tensor == chosen.tensor]:
        sentences.append(
            f"Better quality does not suffice there: {better[-1].choice.name} holds {better[-1].sequences} "
            "such sequences."
        )
    if tier := find_tier(chosen.choice.name):
        sentences.append(_tier_bits(tier, chosen.facts))
    if size := chosen.cache_layout.raw_block_bytes:
        sentences.append(
            f"The newest tokens of a sequence, up to {BLOCK_TOKENS}, are not compressed: each sequence takes "
            f"{size / 2**20:.1f} MiB for them, which is counted."
        )
    if baseline.tokens and chosen.choice.formats != baseline.choice.formats:
        sentences.append(
            f"In the model's own dtype the same memory would hold {baseline.tokens:,} tokens: this is "
            f"{chosen.tokens / baseline.tokens:.2f} times as many."
        )
    if padding := chosen.cache_layout.padding_percent:
        sentences.append(
            "Beside sliding windows all blocks have the size of the largest, and here layers differ in "
            f"their bytes per token: {padding}% of the cache is padding. A KV plan that varies key and value "
            "bits at a constant sum has none."
        )
    if gpu is not None and chosen.facts.weights_counted:
        sentences.append(
            f"No weight files were read: {gib(chosen.facts.weight_bytes or 0)} are counted from the config."
        )
    if chosen.settings.extra_models:
        sentences.append("Memory of draft models and LoRA adapters is not counted.")
    return sentences


def _tier_bits(tier: Tier, facts: ModelFacts) -> str:
    values = f"values {tier.value_bits}"
    if tier.key_bits == max(KEY_BITS) or facts.shares_page_size:
        return f"{tier.cache_dtype} stores keys with {tier.key_bits} bits a number and {values}."
    return (
        f"{tier.cache_dtype} stores keys with {tier.key_bits} bits a number in the mean, more in the layers "
        f"that need them, and {values}."
    )


def insufficient(
    gpu: Accelerator | None, options: Sequence[Option], wanted: int, lower_tier: Option | None
) -> NoPlan:
    """PlanFits=False, with the nearest thing that would fit."""
    best = max(options, key=lambda option: (option.sequences, option.tokens, option.memory))
    context = best.context_length
    asked = f"{wanted} sequence{'s' if wanted > 1 else ''} of {context:,} tokens"
    if best.memory <= 0:
        weights = weight_bytes_per_gpu(best.facts.weight_bytes or 0, best.tensor, best.pipeline)
        return unfit(
            "InsufficientMemory",
            f"{best.facts.architecture} does not fit on {place(gpu, best)}: weights take {gib(weights)} of "
            f"each, and {gib(-best.memory)} are missing beside the engine's work space and kvCache.memory, "
            "where that is set. Name a larger accelerator.type, raise parallelism.pipeline, or serve "
            "quantized weights.",
        )
    ways = []
    if best.sequences:
        ways.append(f"lower capacity.concurrentSequences to {best.sequences}")
    shorter = _longest_context(best, wanted)
    if shorter:
        ways.append(f"lower capacity.contextLength to {shorter}")
    if lower_tier:
        ways.append(
            f"allow kvCache.quality {lower_tier.choice.tier} (on {place(gpu, lower_tier)} it holds "
            f"{lower_tier.sequences})"
        )
    blocks = wanted * best.cache_layout.blocks_per_sequence(context, best.in_flight_tokens) + 1
    need = blocks * best.cache_layout.bytes_per_block
    ways.append(
        f"raise kvCache.memory to {-(-need // 2**20)}Mi"
        if gpu is None
        else "name an accelerator.type with more memory"
    )
    return unfit(
        "InsufficientMemory",
        f"No allowed plan holds {asked}. The nearest, {best.choice.name} on {place(gpu, best)}, holds "
        f"{best.tokens:,} tokens, {best.sequences} such sequences. Way out: {'; or '.join(ways)}.",
    )


def _longest_context(option: Option, wanted: int) -> int:
    """The longest context of which `wanted` sequences fit, in whole blocks; 0 where there is none."""
    step = option.settings.block_tokens
    low, high = 0, option.context_length // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if option.sequences_of(middle * step) >= wanted else (low, middle - 1)
    return low * step
