"""Whether the kernels that are here are those that last ran on a GPU. Gluon has no interpreter, so no test of
`make test` runs the fast path."""

import json
import warnings
from pathlib import Path

import pytest
import sources

RESULT = Path(__file__).parent / "result.json"


def test_the_kernels_ran_on_a_gpu_as_they_are():
    """A warning, since whoever changes a kernel need not have a GPU; a recorded failure fails."""
    if not RESULT.exists():
        pytest.skip("no GPU run is recorded: make test-gpu")
    result = json.loads(RESULT.read_text())
    assert not result["fuzz"]["failures"]
    assert result["graphs"]["passed"] == result["graphs"]["captured"]
    assert "failed" not in (result["memcheck"], result["racecheck"])
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
