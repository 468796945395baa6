"""Random shapes, lengths and inputs for the GPU kernels, against float64 attention and the readable store.

    python3 kernels/tests/gpu/fuzz.py                      2,000 cases
    python3 kernels/tests/gpu/fuzz.py --seed 7 --case 31   one of them again

It needs torch, Triton and this distribution's source on PYTHONPATH, no test tools; `make test-gpu` runs it
under pytest with the rest. Without a GPU, TRITON_INTERPRET=1 with `--device cpu --path portable --budget 200`
runs cases in Triton's interpreter, which checks this file.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it: what other tests share

from cases import Variant, decode_step, decode_variants, store_variants
from store_agreement import assert_same_as_reference

from turboquant_kernels.bench import oracle, subject
from turboquant_kernels.bench.caches import DecodeStep, empty_cache, random_step
from turboquant_kernels.codec import Codec
from turboquant_kernels.formats import KVFormat

ATTENDED_ERROR = 5e-4
"""Relative error of the float32 result that decode kernels may leave."""

BF16_ROUNDING = 2.0**-8
"""Half a unit in the last place, relative: what the cast of the output may add."""

CASES, BUDGET = 2000, 60_000
"""Cases of a whole run, a fifth of them of the store; tokens times KV heads of a decode case at most."""


@dataclass
class Outcome:
    """What a run found."""

    seed: int
    cases: int = 0
    variants: set[str] = field(default_factory=set)
    worst_error: float = 0.0
    failures: list[str] = field(default_factory=list)


def check_decode(variant: Variant, step: DecodeStep) -> float:
    """The relative error of the float32 result. AssertionError where a bound or a promise is broken."""
    run = subject.decode(step, path=variant.path)
    first = run().clone()
    again = run()
    assert torch.equal(first, again), "a repeat gives other bits"
    exact = oracle.attended(
        step.codec,
        step.query,
        step.kv_cache,
        step.block_table,
        step.seq_lens,
        **step.options,
        scale=step.scale,
    )
    error = oracle.relative_error(first, exact)
    assert error <= ATTENDED_ERROR, f"relative error {error:.2e} of the float32 result"
    output = subject.output(step, path=variant.path)()
    expected = oracle.unrotated(step.codec, exact)
    rounding = BF16_ROUNDING if output.is_cuda else 2 * BF16_ROUNDING  # Triton's interpreter truncates
    bound = rounding * expected.abs() + ATTENDED_ERROR * expected.norm(dim=-1, keepdim=True)
    assert output.dtype == torch.bfloat16
    assert ((output.double() - expected).abs() <= bound).all(), (
        "the bf16 output is off by more than a rounding"
    )
    return error


def check_store(fmt: KVFormat, head_dim: int, draw: random.Random, device: torch.device) -> None:
    """What the readable store stores, up to rounding, for random tokens; AssertionError where it is not."""
    codec, kv_heads = Codec(fmt, head_dim), draw.choice((1, 2, 3, 8))
    block_size = 128 if fmt.anchor else draw.choice((16, 32, 64))
    num_blocks = draw.randint(1, 3)
    capacity = num_blocks * block_size
    cpu = torch.device("cpu")
    before = random_step(codec, [capacity], kv_heads, kv_heads, cpu, block_size=block_size).kv_cache
    stored = _copied(codec, before, device)

    count = draw.choice((1, 2, draw.randint(1, capacity), capacity))
    slots = torch.tensor(draw.sample(range(capacity), count))
    slots[torch.rand(count) < 0.1] = -1
    # Keys and values as slices of one projection's output, as models have them.
    vectors = torch.randn(count, 2 * kv_heads, head_dim) * 10 ** draw.uniform(-3, 3)
    for special in (0.0, float("nan"), float("inf"), 1e-30, 6e4):
        if draw.random() < 0.3:
            vectors[draw.randrange(count), draw.randrange(2 * kv_heads)] = special
    vectors = vectors.to(draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)))
    key, value = vectors.split(kv_heads, dim=1)
    subject.store(codec, *vectors.to(device).split(kv_heads, dim=1), stored, slots.to(device))
    after = _copied(codec, stored, cpu)
    assert_same_as_reference(codec, key, value, slots, before, after)
    assert torch.equal(_anchors(before), _anchors(after)), "anchors have changed"


def _copied(codec: Codec, kv_cache: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A cache from `empty_cache` on another device, anchors included."""
    copy = empty_cache(codec, *kv_cache.shape[:3], device)
    _memory(copy).copy_(_memory(kv_cache))
    return copy


def _memory(kv_cache: torch.Tensor) -> torch.Tensor:
    """All bytes of a cache from `empty_cache`: uint8 [num_blocks, bytes]."""
    stride = kv_cache.stride(0)
    return kv_cache.as_strided((len(kv_cache), stride), (stride, 1))


def _anchors(kv_cache: torch.Tensor) -> torch.Tensor:
    """Bytes behind the pages of each block: uint8 [num_blocks, bytes]."""
    return _memory(kv_cache)[:, kv_cache[0].numel() :]


def check_graph(variant: Variant, draw: random.Random, device: torch.device) -> None:
    """A captured step, replayed with other lengths and queries, gives what the call gives outside a graph."""
    step = decode_step(variant, draw, device, budget=20_000)
    call = subject.output(step, path=variant.path)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    full = step.seq_lens.tolist()
    for _ in range(3):
        shorter = [draw.randint(variant.query_len, length) if length else 0 for length in full]
        step.seq_lens.copy_(torch.tensor(shorter, dtype=torch.int32))
        step.query.normal_()
        result.fill_(float("nan"))
        graph.replay()
        replayed = result.clone()
        assert torch.equal(replayed, call()), "a replay differs from the same call outside the graph"
        check_decode(variant, step)


def warm(device: torch.device, path: str | None = None) -> None:
    """Compiles all variants, one a process, into Triton's cache on disk; failures are for `run` to find."""
    count = len(_decoding(path)) + len(store_variants())
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm_one, range(count), [device] * count, [path] * count))


def _warm_one(index: int, device: torch.device, path: str | None) -> None:
    torch.set_num_threads(1)
    decoding, draw = _decoding(path), random.Random(0)
    with contextlib.suppress(Exception):
        if index < len(decoding):
            check_decode(decoding[index], decode_step(decoding[index], draw, device, budget=200))
        else:
            check_store(*store_variants()[index - len(decoding)], draw, device)


def _decoding(path: str | None) -> list[Variant]:
    return [variant for variant in decode_variants() if path in (None, variant.path)]


def run(
    *,
    seed: int,
    cases: int = CASES,
    only: int | None = None,
    device: torch.device,
    path: str | None = None,
    budget: int = BUDGET,
    seconds: float = math.inf,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """`cases` cases of a seed, as many as begin within `seconds`, or `only` one of them."""
    outcome = Outcome(seed)
    decoding = _decoding(path)
    storing = store_variants()
    begin = time.monotonic()
    for index in range(cases) if only is None else [only]:
        if time.monotonic() - begin > seconds:
            break
        draw = random.Random(f"{seed} {index}")
        torch.manual_seed(draw.getrandbits(32))
        try:
            if index % 5 == 4:
                fmt, head_dim = storing[index // 5 % len(storing)]
                name = f"store {fmt.name}{'-anchor' if fmt.anchor else ''}, D {head_dim}"
                check_store(fmt, head_dim, draw, device)
            else:
                variant = decoding[(index - index // 5) % len(decoding)]
                name = str(variant)
                error = check_decode(variant, decode_step(variant, draw, device, budget))
                outcome.worst_error = max(outcome.worst_error, error)
        except Exception as error:  # a kernel that does not compile is a finding like a wrong result
            reason = (str(error).splitlines() or [""])[0]
            outcome.failures.append(f"seed {seed} case {index}: {name}: {type(error).__name__}: {reason}")
            tell(outcome.failures[-1])
            if "CUDA error" in reason:  # the device is lost to this process
                break
        outcome.cases += 1
        outcome.variants.add(name)
        if outcome.cases % 200 == 0:
            tell(f"{outcome.cases} cases, {len(outcome.failures)} failures, {time.monotonic() - begin:.0f} s")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--warm", action="store_true", help="first compile all variants, on all cores")
    parser.add_argument("--path", help="only variants of this path")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after these")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.warm:
        warm(arguments.device, arguments.path)
    outcome = run(
        seed=arguments.seed,
        cases=arguments.cases,
        only=arguments.case,
        device=arguments.device,
        path=arguments.path,
        budget=arguments.budget,
        seconds=arguments.seconds,
    )
    print(
        f"{outcome.cases} cases of {len(outcome.variants)} variants: {len(outcome.failures)} failures, "
        f"largest error of decode {outcome.worst_error:.1e}"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
