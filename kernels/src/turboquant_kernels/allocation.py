"""Key bits by layer at a fixed mean, from a model's weights alone.

The codec adds to a key noise in proportion to the key's energy, and attention multiplies it with the query.
So the noise of a layer's logits at b bits is its sensitivity E|q|^2 E|k|^2 times the codebook's distortion at
b bits, and bits go where they take most noise away. Inputs of a layer are normalized, their coordinates
taken as independent: with g the gains of the norm before it and b a bias

    E|q|^2 ~ |W_q diag(g)|_F^2 + |b_q|^2        E|k|^2 ~ |W_k diag(g)|_F^2 + |b_k|^2

Key anchors take the mean of each block away, and with it most of a bias: what is left of |b_k|^2 is what
rotary embeddings move within `BLOCK_TOKENS` positions, for a pair of coordinates that turns by t a position

    (b_1^2 + b_2^2) (1 - |mean over p of exp(i t p)|^2)

A bias c of that norm adds W c to b. Where queries and keys are normalized themselves, their energy is the sum
of the squared gains of those norms. On three models this gives the same quality as sensitivities of a forward
pass over random token ids. Factors that all layers share are left out.
"""

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

import torch

from turboquant_kernels.codebook import codebook
from turboquant_kernels.formats import BF16, BLOCK_TOKENS, KEY_BITS, Tier
from turboquant_kernels.linear_weights import read_linear
from turboquant_kernels.plans import KVPlan
from turboquant_kernels.tensors import Tensors

_ATTENTION = re.compile(
    r"(?P<root>.*?)layers\.(?P<layer>\d+)\.(?P<block>[a-z_]*attn|attention)\.(k_proj|qkv_proj)\.\w+"
)
_OTHER_LAYERS = re.compile(r"vision|visual|audio|encoder|talker|mtp|draft")
"""In the names of layers that are not the language model's own."""

_TEXT_CONFIGS = ("text_config", "llm_config", "thinker_config")
"""Where the config.json of a multimodal model holds that of its language model."""

_ALTERNATING_WINDOWS = re.compile(r"(cohere2|gemma[23](_text)?)$")
"""Model types whose config.json may leave out which layers have windows."""
_STATES = re.compile(
    r"mamba_|ssm_|linear_(num|key)|layers_block_type|full_attention_interval|attn_layer_period"
)
"""Fields of models with Mamba or linear attention."""

_CENTERED_GAINS = re.compile(r"(gemma(2|3.*)?(_text)?|nemotron|qwen3_next.*|qwen3_5.*|rnj1|step3p5)$")
"""Model types whose norms multiply by 1 + weight."""
_ADJACENT_PAIRS = re.compile(r"(chatglm|glm|glm4|cohere2?|gptj|codegen|ernie4_5)$")
"""Model types whose rotary embeddings turn neighbouring coordinates; others those half a head apart."""
_NORMS_BEFORE = ("input_layernorm", "self_attn_layer_norm", "attention_norm", "ln_1")
_OWN_NORMS = {
    "q": ("q_norm", "query_norm", "q_layernorm", "query_layernorm"),
    "k": ("k_norm", "key_norm", "k_layernorm", "key_layernorm"),
}
_WITHOUT_GAINS = ("olmo",)
"""Model types whose norms have no weights."""


class AllocationError(ValueError):
    """Weights from which no sensitivity can be taken; the text is one line."""


def allocate(tier: Tier, tensors: Tensors, config: Mapping[str, Any], skip: Sequence[int] = ()) -> KVPlan:
    """The tier's plan for a model; the layers of `skip` keep the model's own dtype.

    `config` is the model's config.json. Raises AllocationError where layers cannot have bits of their own, or
    where config or weights do not say what is needed in a way that is known.
    """
    text = _text_config(config)
    if pages_have_one_size(text):
        raise AllocationError("windows or states in some layers make all share pages of one size")
    try:
        found = sensitivities(tensors, text, anchor=tier.anchor)
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
    except KeyError as error:
        raise AllocationError(f"config.json does not say {error}") from error
    except (TypeError, IndexError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise AllocationError(f"config.json or weights are not as they should be: {reason}") from error
    if beyond := [layer for layer in skip if layer >= len(found)]:
        raise AllocationError(
            f"layer {beyond[0]} is to be skipped, and the model has layers 0 to {len(found) - 1}"
        )
    if not all(0 < value < inf for value in found):
        raise AllocationError("the weights of some layer's queries or keys are zero or no numbers")
    dealt = [layer for layer in range(len(found)) if layer not in set(skip)]
    if not dealt:
        raise AllocationError("all layers are skipped")
    key_bits = deal([found[layer] for layer in dealt], tier.key_bits, head_dim, tier.lowest.key_bits)
    formats = {
        layer: replace(tier.format, key_bits=bits) for layer, bits in zip(dealt, key_bits, strict=True)
    }
    return KVPlan(tuple(formats.get(layer, BF16) for layer in range(len(found))))


def pages_have_one_size(text: Mapping[str, Any]) -> bool:
    """Whether windows or states in some layers make all layers share pages of one size: no layer can have
    bits of its own then. `text` is the language model's config."""
    kinds = set(text.get("layer_types") or ())
    states = any(value and _STATES.match(str(field)) for field, value in text.items())
    return len(kinds) > 1 or states or bool(_ALTERNATING_WINDOWS.match(text.get("model_type") or ""))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's config, with the whole model's quantization."""
    nested = (config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), Mapping))
    text = next(nested, config)
    if isinstance(text.get("text_config"), Mapping):
        text = text["text_config"]
    quantization = config.get("quantization_config") or text.get("quantization_config")
    return {**text, "quantization_config": quantization}


def deal(
    sensitivities: Sequence[float], mean_bits: int, head_dim: int, least_bits: int = KEY_BITS[0]
) -> list[int]:
    """Key bits of each layer, at least `least_bits`, and `mean_bits` in the mean or, where the last bit fits
    nowhere, just below.

    Greedy: the next bits go to the layer from which they take most noise a bit, of equal ones to the first.
    """
    distortion = {bits: codebook(bits, head_dim).distortion for bits in KEY_BITS}
    following = dict(pairwise(KEY_BITS))

    def step(layer: int, bits: int) -> tuple[float, int, int]:
        more = following[bits]
        gain = sensitivities[layer] * (distortion[bits] - distortion[more]) / (more - bits)
        return -gain, layer, more

    dealt = [least_bits] * len(sensitivities)
    left = (mean_bits - least_bits) * len(sensitivities)
    steps = [step(layer, least_bits) for layer in range(len(sensitivities))] if left else []
    heapq.heapify(steps)
    while left and steps:
        _, layer, bits = heapq.heappop(steps)
        if bits - dealt[layer] > left:
            continue
        left -= bits - dealt[layer]
        dealt[layer] = bits
        if bits in following:
            heapq.heappush(steps, step(layer, bits))
    return dealt


def sensitivities(tensors: Tensors, config: Mapping[str, Any], *, anchor: bool = False) -> list[float]:
    """E|q|^2 E|k|^2 of each layer with attention, in the model's order, but for a common factor.

    anchor: keys are stored less their block's mean. `config` is that of the text model. Raises
    AllocationError where the layers' queries and keys cannot be told from the tensors' names, or their
    weights are stored in a way that is not known.
    """
    layers: dict[str, dict[int, str]] = {}
    for name in tensors:
        match = _ATTENTION.fullmatch(name)
        if match and not _OTHER_LAYERS.search(match["root"]):
            prefix = f"{match['root']}layers.{match['layer']}."
            layers.setdefault(match["root"], {})[int(match["layer"])] = prefix + match["block"]
    if not layers:
        raise AllocationError("no tensors named ...layers.N.self_attn.k_proj.weight")
    found = max(layers.values(), key=len)
    # Behind the last layer some models keep one that predicts several tokens.
    indices = [index for index in sorted(found) if index < config["num_hidden_layers"]]
    return [_Layer(tensors, found[index], config).sensitivity(anchor) for index in indices]


class _Layer:
    """The attention of one layer. `name` is what its tensors begin with."""

    def __init__(self, tensors: Tensors, name: str, config: Mapping[str, Any]) -> None:
        self._tensors, self._name, self._config = tensors, name, config

    def sensitivity(self, anchor: bool) -> float:
        return self._energy("q") * self._energy("k", anchor)

    def _energy(self, which: str, anchor: bool = False) -> float:
        for norm in (f"{self._name}.{name}" for name in _OWN_NORMS[which]):
            if f"{norm}.weight" in self._tensors:
                return float(self._gains(norm).square().sum())
        weight, bias = self._projection(which)
        constant = torch.zeros(len(weight)) if bias is None else bias
        if norm := self._norm_before():
            if f"{norm}.bias" in self._tensors:
                constant = constant + weight @ self._tensors.read(f"{norm}.bias").float()
            weight = weight * self._gains(norm)
        energy = constant.square()
        if anchor:
            energy = energy.view(-1, self._head_dim) * moved_within_blocks(self._config, self._head_dim)
        return float(weight.square().sum() + energy.sum())

    @property
    def _head_dim(self) -> int:
        heads = self._config["num_attention_heads"]
        return int(self._config.get("head_dim") or self._config["hidden_size"] // heads)

    def _norm_before(self) -> str | None:
        """The norm whose output queries and keys are made from; None where it has no weights."""
        layer = self._name.rpartition(".")[0]
        for name in _NORMS_BEFORE:
            if f"{layer}.{name}.weight" in self._tensors:
                return f"{layer}.{name}"
        if self._config.get("model_type") in _WITHOUT_GAINS:
            return None
        raise AllocationError(f"no tensor named {layer}.{_NORMS_BEFORE[0]}.weight")

    def _projection(self, which: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight float32 [rows, hidden_size] and bias [rows] of queries or keys."""
        own, fused = f"{self._name}.{which}_proj", f"{self._name}.qkv_proj"
        quantization = self._config.get("quantization_config") or {}
        if (weight := read_linear(self._tensors, own, quantization)) is not None:
            return weight, self._bias(own)
        weight, bias = read_linear(self._tensors, fused, quantization), self._bias(fused)
        if weight is None:
            raise AllocationError(f"{own} has no weight, or one that is stored in a way that is not known")
        query_heads = self._config["num_attention_heads"]
        heads = self._config.get("num_key_value_heads") or query_heads
        rows = len(weight) // (query_heads + 2 * heads)
        begin, end = (0, query_heads) if which == "q" else (query_heads, query_heads + heads)
        part = slice(begin * rows, end * rows)
        return weight[part], None if bias is None else bias[part]

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._tensors.read(f"{name}.bias").float() if f"{name}.bias" in self._tensors else None

    def _gains(self, norm: str) -> torch.Tensor:
        gains = self._tensors.read(f"{norm}.weight").float()
        return 1 + gains if _CENTERED_GAINS.match(self._config.get("model_type") or "") else gains


def moved_within_blocks(config: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Of a constant key the part of each coordinate's square that a block's mean leaves over: float32
    [head_dim].

    Rotary embeddings turn pairs of coordinates; those of long contexts are scaled, but for a linear factor,
    in pairs alone that hardly turn within a block, which is left out.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor") or 1.0 if kind == "linear" else 1.0
    share = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    pairs = int(head_dim * share) // 2
    turn = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs) / factor
    mean = torch.sin(BLOCK_TOKENS / 2 * turn) / (BLOCK_TOKENS * torch.sin(turn / 2))
    left = (1 - mean.square()).float()
    adjacent = _ADJACENT_PAIRS.match(config.get("model_type") or "")
    moved = torch.zeros(head_dim)  # what does not turn is all in the mean
    moved[: 2 * pairs] = left.repeat_interleave(2) if adjacent else left.repeat(2)
    return moved
