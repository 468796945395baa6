"""Model facts: one shape for every source, from a config.json and the sizes of the weights.

The hub reader (`turboquant_operator.model_source`), the inspection pod
(`turboquant_runtime.inspect`) and `tq plan` all hand a config dictionary to `read_facts`; nobody else
interprets a model's configuration. Rules per model family are in `families`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from turboquant_operator.api.spec import Architecture
from turboquant_operator.api.status import ModelStatus
from turboquant_operator.planner.families import FAMILIES, Family, unsupported_attention
from turboquant_operator.planner.outcome import NoPlan, refused, unknown
from turboquant_operator.planner.parameters import count_parameters

Document = dict[str, Any]
"""A model as the hub reader or an inspection pod has read it: `config`, `weights` and `revision`."""

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of the dtypes in which the engine computes."""

_MOST_LAYERS = 1024
"""More than any model has, and few enough that a wrong config costs no memory."""

_COUNTS = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "model_max_length",
    "num_key_value_heads",
    "sliding_window",
    "sliding_window_pattern",
    "vocab_size",
)
"""Config fields that are used as numbers where they are present, beside those that are always needed."""

_PREFIX_IMAGES = ("gemma3", "paligemma")
"""Multi-modal models whose image tokens vLLM 0.32.0 lets see each other
(transformers_utils/model_arch_config_convertor.py, `is_mm_prefix_lm`)."""

_LENGTHS_WITH_SCALING = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary scaling whose models name a maximum that has the scaling in it already."""

_WIDE_WEIGHTS = {"F64": 8, "F32": 4}
"""Safetensors dtypes that the engine narrows to its own on loading; all others stay as they are."""


@dataclass(frozen=True)
class ModelFacts:
    """What the planner needs to know about a decoder model."""

    architecture: str
    """Class name from config.json, such as LlamaForCausalLM."""
    windows: tuple[int | None, ...]
    """One entry per attention layer, in order: its sliding window in tokens, None for full attention."""
    attention_heads: int
    """Query heads of one layer."""
    key_value_heads: int
    head_dim: int
    context_length: int | None
    """The longest sequence the model serves; None where its config does not say."""
    dtype: str
    """In which the engine computes and an uncompressed cache is kept: bfloat16, float16 or float32."""
    weight_bytes: int | None
    """Bytes of all weights once the engine has loaded them; None where they are not known."""
    key_bias: bool
    """Keys have a bias (Qwen2, Qwen2.5): a large constant part, which plain rotation does not remove."""
    bidirectional_images: bool = False
    """Tokens of one image see each other in both directions, which compressed pages cannot serve yet."""
    weights_counted: bool = False
    """No weight files were read: the bytes are counted from the config."""
    hidden_size: int | None = None
    intermediate_size: int | None = None
    """Width of the (dense) MLP."""
    vocab_size: int | None = None
    quantization: str | None = None
    """Quantization method of the weights, such as fp8 or awq."""

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.windows)

    @property
    def shares_page_size(self) -> bool:
        """Whether the engine gives all layers pages of one size in bytes, as it does beside windows."""
        return len(set(self.windows)) > 1

    def to_status(self, revision: str = "") -> ModelStatus:
        """These facts as `status.model`; sizes that are unknown are 0."""
        return ModelStatus(
            architecture=self.architecture,
            revision=revision,
            layers=self.layers,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            context_length=self.context_length or 0,
            weight_bytes=self.weight_bytes or 0,
        )


def read_facts(
    config: Mapping[str, Any] | None,
    weights: Mapping[str, int] | None = None,
    given: Architecture | None = None,
) -> ModelFacts | NoPlan:
    """Facts from a config.json dictionary, or the condition that says what is missing or unsupported.

    `weights`: bytes of the weight files by safetensors dtype (BF16, F32, F8_E4M3, ...); sizes whose dtype
    is not known stand under the empty string. `given`: `spec.model.architecture`; it wins over the config,
    and alone it is enough for a model with full attention in every layer.
    """
    given = given or Architecture()
    whole = config or {}
    text = _text_config(whole)
    architecture = _architecture(whole, text)
    if reason := unsupported_attention(text):
        return refused("UnsupportedAttention", f"{architecture} is not supported: {reason}.")
    family = FAMILIES.get(str(text.get("model_type", "")))
    if family is None:
        if not _complete(given):
            return unknown("UnknownArchitecture", _unknown_architecture(architecture, config, given))
        family = Family()
    return _normalise(
        architecture, whole, {**(family.defaults or {}), **_present(text)}, family, weights, given
    )


def _architecture(whole: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    for config in (whole, text):
        names = config.get("architectures")
        if isinstance(names, list) and names:
            return str(names[0])
    return str(text.get("model_type") or "unknown")


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; multi-modal wrappers nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something. A null `sliding_window` does: it means no window."""
    return {name: value for name, value in config.items() if value is not None or name == "sliding_window"}


def _complete(given: Architecture) -> bool:
    return None not in (given.layers, given.attention_heads, given.key_value_heads, given.head_dim)


def _unknown_architecture(architecture: str, config: Mapping[str, Any] | None, given: Architecture) -> str:
    subject = f"{architecture} is not known to this release" if config else "No config.json was read"
    fields = ("layers", "attention_heads", "key_value_heads", "head_dim")
    names = {"attention_heads": "attentionHeads", "key_value_heads": "keyValueHeads", "head_dim": "headDim"}
    missing = ", ".join(names.get(field, field) for field in fields if getattr(given, field) is None)
    return (
        f"{subject}, and its cache is not guessed: if every layer has full attention, "
        f"set spec.model.architecture ({missing})."
    )


def _normalise(
    architecture: str,
    whole: Mapping[str, Any],
    text: Mapping[str, Any],
    family: Family,
    weights: Mapping[str, int] | None,
    given: Architecture,
) -> ModelFacts | NoPlan:
    layers = given.layers or text.get("num_hidden_layers")
    heads = given.attention_heads or text.get("num_attention_heads")
    hidden = text.get("hidden_size")
    head_dim = given.head_dim or (None if family.head_dim_from_hidden else text.get("head_dim"))
    if not head_dim and _is_count(hidden) and _is_count(heads):
        head_dim = hidden // heads
    needed = {"num_attention_heads": heads, "head_dim": head_dim}
    unusable = [] if _is_count(layers, _MOST_LAYERS) else ["num_hidden_layers"]
    unusable += [name for name, value in needed.items() if not _is_count(value)]
    unusable += [name for name in _COUNTS if text.get(name) and not _is_count(text[name])]
    if unusable or not (_is_count(layers) and _is_count(heads) and _is_count(head_dim)):
        return unknown(
            "MissingModelFacts",
            f"config.json of {architecture} has no usable {', '.join(dict.fromkeys(unusable))}: set "
            "spec.model.architecture, or correct the config.",
        )
    windows = _windows(architecture, text, family, layers)
    if isinstance(windows, NoPlan):
        return windows
    dtype = _dtype(whole, text)
    quantization = _quantization(whole, text)
    kv_heads = given.key_value_heads or text.get("num_key_value_heads") or heads
    weight_bytes = given.weight_bytes or _loaded_bytes(weights, dtype, whole, text)
    parameters = None
    if weight_bytes is None and quantization is None and "text_config" not in whole:
        parameters = count_parameters(text, layers, heads, kv_heads, head_dim)
    return ModelFacts(
        architecture=architecture,
        windows=windows,
        attention_heads=heads,
        key_value_heads=kv_heads,
        head_dim=head_dim,
        context_length=given.context_length or _context_length(text),
        dtype=dtype,
        weight_bytes=parameters * ELEMENT_BYTES[dtype] if parameters else weight_bytes,
        weights_counted=parameters is not None,
        key_bias=_key_bias(text, family),
        bidirectional_images=bool(whole.get("vision_config")) and whole.get("model_type") in _PREFIX_IMAGES,
        hidden_size=hidden,
        intermediate_size=text.get("intermediate_size"),
        vocab_size=text.get("vocab_size"),
        quantization=quantization,
    )


def _is_count(value: object, most: int = 2**40) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _windows(
    architecture: str, text: Mapping[str, Any], family: Family, layers: int
) -> tuple[int | None, ...] | NoPlan:
    """The sliding window of each layer, as vLLM 0.32.0 gives it to the layer's cache."""
    window = text.get("sliding_window") or None
    if window is not None:
        window += family.window_extra
    if family.window_switch and not text.get(family.window_switch):
        window = None
    if family.window_switch and window and (text.get("max_window_layers") or layers) < layers:
        return refused(
            "UnsupportedAttention",
            f"{architecture} has a sliding window from layer {text['max_window_layers']} on "
            "(max_window_layers), which the engine does not serve.",
        )
    kinds = text.get("layer_types")
    if not kinds and family.window_every:
        every = text.get("sliding_window_pattern") or family.window_every
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if not kinds:
        return (window,) * layers
    if not isinstance(kinds, list) or len(kinds) != layers:
        named = len(kinds) if isinstance(kinds, list) else "unreadable"
        return unknown(
            "MissingModelFacts",
            f"config.json of {architecture} names {named} layer_types for {layers} layers; it contradicts "
            "itself.",
        )
    if window is None and "sliding_attention" in kinds and not family.window_switch:
        return unknown(
            "MissingModelFacts",
            f"config.json of {architecture} has layers of sliding_attention and no sliding_window: its cache "
            "is not guessed.",
        )
    if len(set(kinds)) == 1 and family.window_every is None:
        # Not interleaved: vLLM then applies the config's window, if it has one, to every layer.
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _context_length(text: Mapping[str, Any]) -> int | None:
    """The model's maximum of tokens as vLLM derives it (config/model.py, `_get_and_verify_max_len`)."""
    longest: int | None = text.get("model_max_length") or text.get("max_position_embeddings")
    if not longest or "gemma3" in str(text.get("model_type", "")):
        return longest or None  # Gemma-3's maximum has the scaling in it already.
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return longest
    factor = 1.0
    for scaling in [value for value in rope.values() if isinstance(value, Mapping)] or [rope]:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in _LENGTHS_WITH_SCALING:
            continue
        factor = scaling.get("factor") or 1.0
        if not isinstance(factor, int | float):
            return None
    return int(longest * factor)


def _dtype(whole: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The engine's dtype for `--dtype auto`: the config's, with float32 narrowed to bfloat16."""
    configured = (
        whole.get("torch_dtype") or whole.get("dtype") or text.get("torch_dtype") or text.get("dtype")
    )
    name = str(configured or "float32").removeprefix("torch.")
    return "float16" if name in ("float16", "half") else "bfloat16"


def _quantization(whole: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    for config in (whole, text):
        scheme = config.get("quantization_config") or config.get("compression_config")
        if isinstance(scheme, Mapping):
            return str(scheme.get("quant_method") or "unknown")
    return None


def _key_bias(text: Mapping[str, Any], family: Family) -> bool:
    if isinstance(family.key_bias, bool):
        return family.key_bias
    return bool(text.get(family.key_bias, family.key_bias_default))


def _loaded_bytes(
    weights: Mapping[str, int] | None, dtype: str, whole: Mapping[str, Any], text: Mapping[str, Any]
) -> int | None:
    """Bytes in memory: float32 files of an unquantized model shrink to the engine's dtype."""
    if not weights:
        return None
    stored = str(
        whole.get("torch_dtype") or whole.get("dtype") or text.get("torch_dtype") or text.get("dtype")
    )
    total = 0
    for name, size in weights.items():
        width = _WIDE_WEIGHTS.get("F32" if not name and "float32" in stored else name)
        total += size * ELEMENT_BYTES[dtype] // width if width else size
    return total


def with_dtype(facts: ModelFacts, dtype: str) -> ModelFacts:
    """The facts with the engine's `--dtype`: weights of an unquantized model change size with it."""
    if facts.weight_bytes is None or facts.quantization or dtype == facts.dtype:
        return replace(facts, dtype=dtype)
    scaled = facts.weight_bytes * ELEMENT_BYTES[dtype] // ELEMENT_BYTES[facts.dtype]
    return replace(facts, dtype=dtype, weight_bytes=scaled)
