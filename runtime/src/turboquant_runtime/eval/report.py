"""What a person sees of an evaluation: a table, and a picture of KL along the texts. No torch, no vLLM."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy
from rich.box import SIMPLE
from rich.table import Table

from turboquant_runtime.eval.metrics import Array
from turboquant_runtime.eval.results import Row
from turboquant_runtime.eval.workload import CHUNK_TOKENS, GREEDY_TOKENS

_BIN_TOKENS = 64
"""Positions that one point of the picture averages: single ones differ by factors of a thousand."""

_LOWEST_KL = 1e-7
"""Nats; what rounding of equal float32 distributions gives, and the bottom of the logarithmic axis."""

_COLORS = ("#2f6fb0", "#c9a13b", "#3a8f5c", "#a4508b", "#d06a4c", "#4aa3a8")
_BASELINE_COLORS = {"auto": "#8a8f98", "fp8": "#5b6270"}


def table(model: str, rows: Sequence[Row]) -> Table:
    """One line an engine; `-` where a number was not measured."""
    result = Table(
        title=f"{Path(model).name}: next-token KL from bf16, nats",
        title_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("cache", no_wrap=True)
    for header in ("bytes", "KL", "p99", "top-1", "far KL"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("worst text")
    result.add_column("codes", justify="right", no_wrap=True)
    result.add_column(f"greedy\nof {GREEDY_TOKENS}", justify="right", no_wrap=True)
    for row in rows:
        worst = f"{row.worst_text}\n{row.kl_by_text[row.worst_text]:.3g}" if row.worst_text else "-"
        result.add_row(
            row.label,
            _number(row.bytes_per_token_per_head, "d"),
            _number(row.kl_mean, ".3g"),
            _number(row.kl_p99, ".3g"),
            _number(row.top1, ".1%"),
            _number(row.kl_far, ".3g"),
            worst,
            "-" if row.codes is None else f"{row.codes}/{row.codes_planted}",
            _number(row.greedy_tokens, ".1f"),
        )
    return result


def notes(rows: Sequence[Row], far_reason: str | None) -> list[str]:
    """Why numbers are missing, in sentences."""
    missing = [f"{row.label}: not measured: {row.note}" for row in rows if row.note]
    return missing if far_reason is None else [*missing, f"far KL: not measured: {far_reason}"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(model: str, rows: Sequence[Row], kl: Mapping[str, Sequence[Array]], path: Path) -> None:
    """A picture of the mean KL by position, on a logarithmic axis, one line for each label of `kl`.

    `kl` has the KL of each text's scored positions, nats. Equal input gives equal bytes of an svg. ValueError
    if `kl` is empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "eval"
    from matplotlib import pyplot

    if not kl:
        raise ValueError("no engine was compared with the reference")
    figure, axis = pyplot.subplots(figsize=(7.6, 4.2))
    colors = cycle(_COLORS)
    for row in rows:
        if row.label not in kl:
            continue
        positions, means = _binned(kl[row.label])
        is_baseline = row.kv_cache_dtype in _BASELINE_COLORS
        axis.plot(
            positions,
            numpy.maximum(means, _LOWEST_KL),
            color=_BASELINE_COLORS[row.kv_cache_dtype] if is_baseline else next(colors),
            linestyle="--" if is_baseline else "-",
            marker=".",
            label=f"{row.label}: {row.kl_mean:.3g}",
        )
    axis.set_yscale("log")
    axis.set_xlabel(f"position in the text, tokens (means of {_BIN_TOKENS})")
    axis.set_ylabel("next-token KL from bf16, nats")
    axis.set_title(Path(model).name, fontsize=10)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        title="cache: mean KL", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _binned(kl: Sequence[Array]) -> tuple[list[float], list[float]]:
    """Middle position and mean KL of each bin, over the texts that reach it."""
    longest = max(map(len, kl))
    starts = range(0, longest, _BIN_TOKENS)
    bins = [numpy.concatenate([text[start : start + _BIN_TOKENS] for text in kl]) for start in starts]
    middles = [CHUNK_TOKENS + (start + min(start + _BIN_TOKENS, longest) - 1) / 2 for start in starts]
    return middles, [float(values.mean()) for values in bins]
