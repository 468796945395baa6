"""The two clocks, and the card's copy bandwidth.

`do_bench` flushes the L2 cache before each call by writing to it; the lines so dirtied are written back
while the kernel runs, so that a pure stream over 277 MB takes 14% longer under it than back to back
(measured on an H100). `rotating_ms` has calls follow one another as layers do in an engine, each on
another cache, so that none finds its bytes in L2.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.testing import do_bench

Call = Callable[[], object]

WARMUP_MS, REPEAT_MS = 5, 40
"""Per measurement. Spread of medians over repeated runs is 1% with these."""

ROTATION_BYTES = 320 << 20
"""Bytes that a rotation covers at least: several times the L2 cache of an H200 (60 MB)."""

MOST_CACHES = 8


def cache_count(cache_bytes: int) -> int:
    """Caches to rotate over: from 2 to `MOST_CACHES`."""
    return max(2, min(MOST_CACHES, -(-ROTATION_BYTES // cache_bytes)))


def do_bench_ms(call: Call) -> float:
    """Median of Triton's do_bench over replays of a CUDA graph that holds one call, milliseconds.

    A graph, since a Triton launch costs the host about 58 us, which short kernels would be measured by.
    """
    graph = _captured([call])
    return float(do_bench(graph.replay, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median"))


def rotating_ms(calls: Sequence[Call], least: int = 12, repeats: int = 5) -> float:
    """Milliseconds a call, back to back in one CUDA graph: at least `least` calls that take turns, replayed
    `repeats` times, the median."""
    rounds = -(-least // len(calls))
    graph = _captured([*calls] * rounds)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a device-to-device copy of 4 GiB, on a GPU that is awake.

    Not in a graph: there a copy is the copy engine's, which is slower by a third.
    """
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = do_bench(
        lambda: target.copy_(source), warmup=200, rep=100, grad_to_none=None, return_mode="median"
    )
    return 2 * source.numel() / (milliseconds * 1e-3)


class CompileTimes:
    """Context in which first-call compile times of this project's kernels are noted, in seconds.

    By kernel and the numbers it is specialized to. What Triton's cache on disk held took no compiler and is
    left out.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "CompileTimes":
        self._before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = self._note
        return self

    def __exit__(self, *_: object) -> None:
        triton.knobs.compilation.listener = self._before

    def _note(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if cache_hit or not src.fn.__module__.startswith(__package__.partition(".")[0]):
            return
        constants = {src.fn.arg_names[place[0]]: value for place, value in sorted(src.constants.items())}
        for value in list(constants.values()):
            if hasattr(value, "_asdict"):  # a named tuple of them
                constants |= value._asdict()
        numbers = (f"{name}={value}" for name, value in constants.items() if isinstance(value, int))
        self.seconds[f"{src.name}[{', '.join(numbers)}]"] = times.total * 1e-6


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    for call in dict.fromkeys(calls):
        call()  # compiles, and allocates what a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
