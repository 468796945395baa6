"""`tq bench engine` on real engines: the smoke group, on the CPU."""

import json
import subprocess
import sys

import pytest

from turboquant_runtime.bench.cases import GROUPS

pytestmark = pytest.mark.engine

TQ = "from turboquant_kernels.cli import main; main()"


def test_the_smoke_group_measures_every_case_on_every_engine(tmp_path) -> None:
    command = [sys.executable, "-c", TQ, "bench", "engine", "--group", "smoke", "--out", str(tmp_path)]
    log = tmp_path / "log"
    result = subprocess.run([*command, "--log", str(log)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr + log.read_text()
    rows = json.loads((tmp_path / "engine.json").read_text())
    cases = [name for case in GROUPS["smoke"].cases for name in case.names]
    assert [(row["case"], row["kv_cache_dtype"]) for row in rows] == [
        (case, cache) for case in cases for cache in ("auto", "tq-k4v4")
    ]
    capacity = {row["kv_cache_dtype"]: row["capacity_tokens"] for row in rows}
    # Of the 8 blocks that a sequence of 512 tokens has, 4 hold its newest tokens uncompressed.
    assert capacity["tq-k4v4"] / capacity["auto"] == pytest.approx(3.875 * 4 / 8, rel=0.01)
    for row in rows:
        (rate,) = (
            row[name]
            for name in ("decode_tokens_per_second", "prefill_tokens_per_second", "output_tokens_per_second")
            if row[name] is not None
        )
        assert rate > 0
        assert row["repeats"] > 1
        assert row["start_seconds"] > 0
    sessions = [row for row in rows if row["case"].startswith("sessions")]
    assert all(row["cached_prompt_fraction"] > 0.5 for row in sessions)
    assert (tmp_path / "engine.svg").stat().st_size > 1000
