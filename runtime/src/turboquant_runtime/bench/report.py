"""What a person sees of the rows: tables, and a picture of bars. No torch, no vLLM."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from turboquant_runtime.bench.cases import BASELINES
from turboquant_runtime.bench.results import Row

LABELS = {"auto": "bf16", "int4_per_token_head": "vLLM int4", "turboquant_4bit_nc": "vLLM turboquant"}
"""What readers call a value of `--kv-cache-dtype`, where they do not call it by its name."""

_COLORS = {
    "auto": "#8a8f98",
    "fp8": "#5b6270",
    "int4_per_token_head": "#dcc684",
    "turboquant_4bit_nc": "#c9a13b",
}
_OWN_COLOR = "#2f6fb0"
_COLUMNS = 4
"""Panels side by side: more cannot be read at the width of a page."""


def label(cache: str) -> str:
    return LABELS.get(cache, cache)


def ratios(rows: Iterable[Row]) -> Mapping[tuple[str, ...], Mapping[str, float]]:
    """Each row's rate over that of each baseline of the same case and engine flags, by the row's key."""
    rates = {row.key: row.rate for row in rows}
    result: dict[tuple[str, ...], dict[str, float]] = {}
    for key, rate in rates.items():
        baselines = ((name, rates.get((*key[:-1], name))) for name in BASELINES)
        result[key] = {name: rate / other for name, other in baselines if rate and other}
    return result


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each GPU, model, flags and case, with columns for what the case has.

    A ratio to a row of another run has a `~`.
    """
    over = ratios(rows)
    subjects = dict.fromkeys(row.key[:-1] for row in rows)
    return [_table([row for row in rows if row.key[:-1] == subject], over) for subject in subjects]


def _table(rows: Sequence[Row], over: Mapping[tuple[str, ...], Mapping[str, float]]) -> Table:
    first = rows[0]
    runs = {row.kv_cache_dtype: row.date for row in rows}

    def ratio(row: Row, baseline: str) -> str:
        value = over[row.key].get(baseline)
        return "-" if value is None else _mark(row.date, runs[baseline]) + f"{value:.2f}"

    columns: dict[str, Callable[[Row], str]] = {
        "capacity\ntokens": lambda row: f"{row.capacity_tokens:,}",
        "tokens/s": lambda row: _number(row.rate, ",.1f"),
        "x bf16": lambda row: ratio(row, "auto"),
        "x fp8": lambda row: ratio(row, "fp8"),
        "spread": lambda row: _number(row.spread, ".1%"),
        "TTFT\ns": lambda row: _number(row.median_ttft_seconds, ".2f"),
        "cached": lambda row: _number(row.cached_prompt_fraction, ".0%"),
        "start\ns": lambda row: f"{row.start_seconds:.1f}",
    }
    flags = "" if first.settings == "plain" else f", {first.settings}"
    title = f"{first.model}{flags}: {first.case} ({first.gpu})"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("cache", no_wrap=True)
    shown = [header for header, cell in columns.items() if any(cell(row) != "-" for row in rows)]
    for header in shown:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(label(row.kv_cache_dtype), *(columns[header](row) for header in shown))
    return table


def notes(rows: Iterable[Row]) -> list[str]:
    """Why rows are empty, in sentences."""
    return [f"{row.model} {row.case}: {label(row.kv_cache_dtype)} {row.note}" for row in rows if row.note]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mark(run: str, other: str) -> str:
    """What stands before a ratio: nothing within one run."""
    return "" if run == other else "~"


class Bar(NamedTuple):
    """What one cache reached in a panel."""

    value: float
    spread: float = 0.0
    """Relative."""
    run: str = ""
    """`Row.date`; a capacity, which no run changes, has none."""


Bars = Mapping[str, Bar]
"""By cache."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """An svg with lines of panels for each GPU, model and flags: capacity, then tokens/s of each case.

    A bar is annotated with its value over bf16's, or over fp8's where bf16 cannot hold the case (the title
    says so), with a `~` where the two are of different runs; the black line at its top is the spread of the
    repeats. ValueError if no row has a rate.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "engine"  # the same rows give the same bytes
    from matplotlib import pyplot

    engines = {
        row.engine: [other for other in rows if other.engine == row.engine] for row in rows if row.rate
    }
    if not engines:
        raise ValueError("no row has a rate")
    lines = [
        (engine, panels[first : first + _COLUMNS])
        for engine, panels in ((engine, [_capacity(own), *_rates(own)]) for engine, own in engines.items())
        for first in range(0, len(panels), _COLUMNS)
    ]
    columns = max(len(panels) for _, panels in lines)
    figure, axes = pyplot.subplots(
        len(lines), columns, figsize=(3.1 * columns, 2.6 * len(lines)), squeeze=False
    )
    for line, ((gpu, model, settings), panels) in zip(axes, lines, strict=True):
        for axis in line[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, bars) in zip(line, panels, strict=False):
            baseline = next((name for name in BASELINES if name in bars), None)
            for place, (cache, bar) in enumerate(bars.items()):
                color = _COLORS.get(cache, _OWN_COLOR)
                error = bar.value * bar.spread / 2
                axis.bar(place, bar.value, yerr=error, color=color, width=0.72, ecolor="black")
                if baseline:
                    text = f"{_mark(bar.run, bars[baseline].run)}{bar.value / bars[baseline].value:.2f}x"
                    axis.annotate(text, (place, bar.value + error), ha="center", va="bottom", fontsize=7)
            names = [label(cache) for cache in bars]
            axis.set_xticks(range(len(bars)), names, rotation=35, ha="right", fontsize=8)
            over = f" (over {label(baseline)})" if baseline and baseline != BASELINES[0] else ""
            axis.set_title(title + over, fontsize=9)
            axis.tick_params(axis="y", labelsize=7)
            axis.margins(y=0.12)
            axis.spines[["top", "right"]].set_visible(False)
        flags = "" if settings == "plain" else f"\n{settings}"
        line[0].set_ylabel(f"{model}{flags}\n{gpu}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _capacity(rows: Iterable[Row]) -> tuple[str, Bars]:
    return "capacity, million tokens", {row.kv_cache_dtype: Bar(row.capacity_tokens / 1e6) for row in rows}


def _rates(rows: Sequence[Row]) -> list[tuple[str, Bars]]:
    """A panel a case."""
    return [
        (
            f"{case}, tokens/s",
            {
                row.kv_cache_dtype: Bar(row.rate, row.spread or 0.0, row.date)
                for row in rows
                if row.case == case and row.rate
            },
        )
        for case in dict.fromkeys(row.case for row in rows if row.rate)
    ]
