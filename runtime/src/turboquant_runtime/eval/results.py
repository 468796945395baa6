"""What engines report and the rows made of it. No torch, no vLLM."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy

from turboquant_kernels.formats import base_format
from turboquant_runtime.eval.metrics import Array, Mask, agreeing_tokens
from turboquant_runtime.eval.workload import CHUNK_TOKENS, Workload


@dataclass(frozen=True)
class EngineRun:
    """One engine of an evaluation."""

    model: str
    cache: str
    """Value of `--kv-cache-dtype`."""
    chunk_tokens: int = CHUNK_TOKENS
    is_reference: bool = False

    @property
    def label(self) -> str:
        """What readers call it."""
        name = "bf16" if self.cache == "auto" else self.cache
        return name if self.chunk_tokens == CHUNK_TOKENS else f"{name}, chunk {self.chunk_tokens}"


@dataclass(frozen=True)
class Measured:
    """What one engine computed. Lists have an item for each text, code or prompt of the workload."""

    device: str
    device_type: str
    """`cpu` or `cuda`."""
    versions: str
    head_dim: int
    completions: list[str]
    """What followed the questions for codes."""
    greedy: list[list[int]]
    kl: list[Array] = field(default_factory=list)
    """KL from the reference, nats, float32 [scored positions]; the reference itself has none."""
    top1: list[Mask] = field(default_factory=list)
    """Whether its most likely token is the reference's, bool [scored positions]."""


@dataclass(frozen=True)
class Row:
    """One engine beside the reference. None was not measured."""

    label: str
    kv_cache_dtype: str
    chunk_tokens: int
    bytes_per_token_per_head: int | None = None
    kl_mean: float | None = None
    """Nats, over the scored positions of all texts."""
    kl_p99: float | None = None
    top1: float | None = None
    """Share of scored positions."""
    kl_far: float | None = None
    """Mean over the far positions alone."""
    kl_by_text: dict[str, float] = field(default_factory=dict)
    worst_text: str | None = None
    codes: int | None = None
    codes_planted: int | None = None
    greedy_tokens: float | None = None
    """Mean over prompts of the tokens before the first that differs from the reference's."""
    note: str = ""
    """Why nothing was measured."""


def row(
    run: EngineRun,
    measured: Measured,
    workload: Workload,
    reference: Measured,
    far: Sequence[Mask] | None,
) -> Row:
    """The row of an engine; that of the reference has no distances to itself."""
    returned = [
        text.strip().startswith(code.answer)
        for text, code in zip(measured.completions, workload.codes, strict=True)
    ]
    result = Row(
        run.label,
        run.cache,
        run.chunk_tokens,
        bytes_per_token_per_head=token_bytes(run.cache, measured.head_dim, measured.device_type),
        codes=sum(returned),
        codes_planted=len(returned),
    )
    if run.is_reference:
        return result
    kl = numpy.concatenate(measured.kl)
    names = [text.name for text in workload.texts]
    by_text = {name: float(values.mean()) for name, values in zip(names, measured.kl, strict=True)}
    agreeing = map(agreeing_tokens, reference.greedy, measured.greedy)
    return Row(
        **vars(result)
        | {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(numpy.quantile(kl, 0.99)),
            "top1": float(numpy.concatenate(measured.top1).mean()),
            "kl_far": None if far is None else float(kl[numpy.concatenate(far)].mean()),
            "kl_by_text": by_text,
            "worst_text": max(by_text, key=by_text.__getitem__),
            "greedy_tokens": statistics.fmean(agreeing),
        }
    )


def unmeasured(run: EngineRun, reason: str) -> Row:
    """The row of an engine that failed."""
    return Row(run.label, run.cache, run.chunk_tokens, note=reason)


def token_bytes(cache: str, head_dim: int, device: str) -> int | None:
    """Bytes of one token of one KV head, in the mean of a tier; None for a cache that is none of ours."""
    try:
        return base_format("bf16" if cache == "auto" else cache, device).token_bytes(head_dim)
    except ValueError:
        return None


def rounded(value: object) -> object:
    """JSON's form of a row: floats with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
