"""Whether the kernels that are here are those that last ran on a GPU. Gluon has no interpreter, so no test of
`make test` runs the fast path."""

import json
import warnings

import pytest
import sources
from record import RESULT, problems


def test_the_kernels_ran_on_a_gpu_as_they_are():
    """A warning, since whoever changes a kernel need not have a GPU; a recorded failure fails."""
    if not RESULT.exists():
        pytest.skip("no GPU run is recorded: make test-gpu")
    result = json.loads(RESULT.read_text())
    assert not problems(result)
    if result["sources"] != sources.digest():
        warnings.warn(
            f"the kernels have changed since they ran on {result['gpu']}, {result['date']}: make test-gpu",
            stacklevel=1,
        )


def test_a_kernels_source_changes_the_digest_and_others_do_not(tmp_path, monkeypatch):
    for name in ("store/kernel.py", "codebook.py", "tuning/gpu.json", "cli.py", "bench/rows.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path)
    before = sources.digest()
    for name in ("cli.py", "bench/rows.py"):
        (tmp_path / name).write_text("after")
    assert sources.digest() == before
    for name in ("store/kernel.py", "codebook.py", "tuning/gpu.json"):
        (tmp_path / name).write_text("after")
        assert sources.digest() != before
        (tmp_path / name).write_text("before")


@pytest.mark.parametrize(
    "fault",
    [
        {"fuzz": {"failures": ["seed 1 case 2: decode: AssertionError"]}},
        {"graphs": {"captured": 2, "passed": 1}},
        {"tail": {"failure": "relative error 1.2e-01 of the float32 result"}},
        {"racecheck": {"default": "clean: 6 of 6 variants", "others": "failed: 3 hazards"}},
    ],
)
def test_faults_in_a_record_are_told(fault):
    good = {
        "fuzz": {"failures": []},
        "graphs": {"captured": 2, "passed": 2},
        "tail": {"error": 2e-4},
        "memcheck": {"default": "clean: 6 of 6 variants"},
        "racecheck": {"default": "skipped: stopped without a report, after 2 of 6 variants"},
    }
    assert problems(good) == []
    assert len(problems(good | fault)) == 1
