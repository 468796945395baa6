"""Why a real engine did not start, as the kubelet gets to read it."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

SERVE = "import sys; from turboquant_runtime.serve import SERVER, run; from pathlib import Path; "
SERVE += "sys.exit(run([sys.executable, *SERVER, *sys.argv[2:]], Path(sys.argv[1])))"


def test_a_cache_that_is_too_small_is_told_in_the_termination_log(dummy_model, tmp_path) -> None:
    """The engine's own process fails; the server's last lines do not say why."""
    termination_log = tmp_path / "termination-log"
    termination_log.touch()
    command = [sys.executable, "-c", SERVE, str(termination_log), "--model", str(dummy_model("LLAMA"))]
    command += ["--load-format=dummy", "--enforce-eager", "--kv-cache-dtype=tq-k4v4"]
    command += ["--kv-cache-memory-bytes=512K"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    assert "To serve at least one request" not in done.stdout[-2048:]
    message = termination_log.read_text()
    assert message.startswith("ValueError: To serve at least one request with the model's max seq len (8192)")
    assert "root cause" not in message
