"""What the clocks decide without a GPU."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import triton

from turboquant_kernels.bench.clocks import MOST_CACHES, ROTATION_BYTES, CompileTimes, cache_count


@pytest.mark.parametrize(
    ("cache_bytes", "count"),
    [
        (1 << 40, 2),
        (ROTATION_BYTES // 2, 2),
        (ROTATION_BYTES // 3, 4),
        (ROTATION_BYTES // 4, 4),
        (1, MOST_CACHES),
    ],
)
def test_caches_cover_more_than_the_l2_cache(cache_bytes, count):
    assert cache_count(cache_bytes) == count


class Specialization(NamedTuple):
    ROWS: int
    TEXT: str


def compiled(module, cache_hit=False):
    """Tells Triton's listener what Triton tells it of a compilation."""
    function = SimpleNamespace(__module__=module, arg_names=["pointer", "BITS", "ASM", "D", "SPEC"])
    constants = {(4,): Specialization(4, "mma"), (3,): 128, (1,): 4, (2,): "prmt"}
    source = SimpleNamespace(name="kernel", fn=function, constants=constants)
    triton.knobs.compilation.listener(
        src=source,
        metadata={},
        metadata_group={},
        times=SimpleNamespace(total=1_500_000),
        cache_hit=cache_hit,
    )


def test_compile_times_are_of_our_own_kernels_that_were_compiled():
    before = triton.knobs.compilation.listener
    with CompileTimes() as times:
        compiled("turboquant_kernels.decode.portable", cache_hit=True)
        compiled("vllm.v1.attention.ops.somewhere")
        assert times.seconds == {}
        compiled("turboquant_kernels.decode.portable")
    assert times.seconds == {"kernel[BITS=4, D=128, ROWS=4]": 1.5}
    assert triton.knobs.compilation.listener is before
