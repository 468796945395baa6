"""The rows of docs/benchmarks/engine.json: one an engine and case. No torch, no vLLM.

`workloads` makes them, `runner` hands them on as they come, `report` reads them.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from turboquant_runtime.bench.cases import CACHES, GROUPS, VLLM_COMPRESSED


@dataclass(frozen=True)
class Row:
    """What one case measured on one engine. None was not measured; rates are medians of the repeats."""

    gpu: str
    model: str
    """Its shape; weights are random."""
    settings: str
    """A name of `cases.SETTINGS`: the engine's flags."""
    kv_cache_dtype: str
    case: str
    """`8x32000`: sequences x context; other names are those of `cases`."""
    capacity_tokens: int
    """What the engine itself reports."""
    start_seconds: float
    """From before vLLM's import until the engine takes requests. An engine that is the first of its kind on a
    machine compiles kernels in this time; `start` rows have warm starts."""
    decode_tokens_per_second: float | None = None
    """All running sequences together, in steps that only decode."""
    prefill_tokens_per_second: float | None = None
    """Tokens of a prompt over the time to its first output token."""
    output_tokens_per_second: float | None = None
    """Output tokens over the time of everything, prefill and waiting included."""
    median_ttft_seconds: float | None = None
    """Time to the first token of a session's turn, waiting included."""
    cached_prompt_fraction: float | None = None
    """Of the sessions' prompt tokens, those that the prefix cache held."""
    repeats: int = 0
    spread: float | None = None
    """Largest less smallest of the repeats, over their median."""
    note: str = ""
    """Why nothing was measured."""
    date: str = ""
    """UTC, when the command began: rows with one date are of one run on one machine."""
    versions: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What a row is about; a newer row with the same key replaces it."""
        return self.gpu, self.model, self.settings, self.case, self.kv_cache_dtype

    @property
    def engine(self) -> tuple[str, str, str]:
        return self.gpu, self.model, self.settings

    @property
    def rate(self) -> float | None:
        """The row's tokens per second, of whichever kind its case has."""
        rates = (self.decode_tokens_per_second, self.prefill_tokens_per_second, self.output_tokens_per_second)
        return next((rate for rate in rates if rate is not None), None)


def repeated(values: Iterable[float]) -> dict[str, float]:
    """The fields `repeats` and `spread` of a row, from what was measured each time."""
    values = list(values)
    return {"repeats": len(values), "spread": (max(values) - min(values)) / median(values)}


def warm_start(rows: list[Row]) -> Row:
    """One row of the `start` rows of engines that were started one after the other."""
    seconds = [row.start_seconds for row in rows]
    return replace(rows[0], start_seconds=median(seconds), **repeated(seconds))


def read_rows(path: Path) -> list[Row]:
    """The rows of an engine.json; none where there is no such file."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows, numbers with four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [
        {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
        for row in map(asdict, rows)
    ]
    path.write_text(json.dumps(documents, indent=1) + "\n")


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The new rows and the old ones of other engines and cases, ordered as `cases` lists them."""
    rows = {row.key: row for row in (*old, *new)}
    cases = [name for group in GROUPS.values() for case in group.cases for name in case.names]
    models = [group.model for group in GROUPS.values()]
    settings = [group.settings for group in GROUPS.values()]
    caches = (*CACHES, *VLLM_COMPRESSED)

    def place(row: Row) -> tuple[object, ...]:
        return (
            row.gpu,
            *_place(models, row.model),
            *_place(settings, row.settings),
            *_place(cases, row.case),
            *_place(caches, row.kv_cache_dtype),
        )

    return sorted(rows.values(), key=place)


def _place(names: Iterable[str], name: str) -> tuple[int, str]:
    """Sorts known names by their place, others behind them by name."""
    names = list(names)
    return (names.index(name) if name in names else len(names)), name
