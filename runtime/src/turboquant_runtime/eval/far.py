"""How much a model's prediction at each position depends on tokens far before it, by transformers.

The KL between the model and itself where each query sees only its last `NEAR_TOKENS` tokens and the first
`FIRST_TOKENS` of the text. Where it is large, a cache that stores far tokens badly must show.
"""

from dataclasses import dataclass
from typing import Any

from turboquant_runtime.eval.metrics import Array, divergence
from turboquant_runtime.eval.process import Say
from turboquant_runtime.eval.workload import Text

NEAR_TOKENS = 128
FIRST_TOKENS = 4
"""Many models put the attention that they do not need on the first tokens (attention sinks); without them
they compute something else altogether."""

ROWS = 128
"""Rows of logits that are compared at once."""


@dataclass(frozen=True)
class Task:
    """A checkpoint or hub name, and the texts."""

    model: str
    texts: tuple[Text, ...]


def measure(task: Task, say: Say) -> list[Array]:
    """KL of each text's scored positions, nats, float32 [scored].

    Raises whatever transformers raises, and ValueError for a model that cannot be run with such masks.
    """
    say("start")
    import torch
    from transformers import AutoModelForCausalLM

    # Of all attention implementations the eager one alone takes any mask and computes all that models add.
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto", attn_implementation="eager")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    result = []
    for text in task.texts:
        say(text.name)
        with torch.inference_mode():
            result.append(_dependence(model, text))
    if all((kl < 1e-6).all() for kl in result):
        raise ValueError(f"{type(model).__name__} of transformers ignores attention masks")
    return result


def _dependence(model: Any, text: Text) -> Array:
    import torch

    tokens = torch.tensor([text.tokens], device=model.device)

    def logits(near: bool) -> Any:
        """[scored, vocabulary] in the model's dtype."""
        mask = masks(model.config.get_text_config(), len(text.tokens), near, model.dtype, model.device)
        return model(tokens, attention_mask=mask, use_cache=False).logits[0, slice(*_bounds(text))]

    rows = zip(logits(near=False).split(ROWS), logits(near=True).split(ROWS), strict=True)
    kl = [divergence(full.float().log_softmax(-1), near.float().log_softmax(-1)) for full, near in rows]
    return torch.cat(kl).cpu().numpy()


def _bounds(text: Text) -> tuple[int, int]:
    return text.scored.start, text.scored.stop


def masks(config: Any, tokens: int, near: bool, dtype: Any, device: Any = "cpu") -> Any:
    """Additive causal masks [1, 1, tokens, tokens], 0 or the dtype's lowest number; near tokens only, or all.

    A model whose config names its layers' types takes a dict with a mask for each type. Sliding windows are
    kept. Raises ValueError for a type of layers that is neither full nor sliding attention.
    """
    import torch

    query = torch.arange(tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)[None, :]
    seen = key <= query
    if near:
        seen &= (key > query - NEAR_TOKENS) | (key < FIRST_TOKENS)

    def additive(window: int | None) -> Any:
        allowed = seen if window is None else seen & (key > query - window)
        lowest = torch.finfo(dtype).min
        return torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=device).masked_fill(~allowed, lowest)

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if unknown := types - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types {', '.join(sorted(unknown))}: no mask for near tokens is known")
    if not types:
        return additive(window)
    return {kind: additive(window if kind == "sliding_attention" else None) for kind in types}
