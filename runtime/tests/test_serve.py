"""The images' entry point around small stand-ins for the server: output, exit code, signals, last words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVE = "import sys; from turboquant_runtime.serve import run; from pathlib import Path; "
SERVE += "sys.exit(run([sys.executable, '-uc', sys.argv[1]], Path(sys.argv[2])))"


@pytest.fixture
def termination_log(tmp_path: Path) -> Path:
    """An empty file, as the kubelet makes it."""
    file = tmp_path / "termination-log"
    file.touch()
    return file


def start(server: str, termination_log: Path) -> subprocess.Popen[str]:
    """The entry point with a Python program in the server's place."""
    command = [sys.executable, "-c", SERVE, server, str(termination_log)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def serve(server: str, termination_log: Path) -> tuple[int, str]:
    """Exit code and standard output of an entry point whose server ends by itself."""
    with start(server, termination_log) as process:
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_failing_server_leaves_its_exception_in_the_termination_log(termination_log: Path) -> None:
    code, output = serve("print('starting'); raise ValueError('head_dim 72')", termination_log)
    assert code == 1
    assert output.startswith("starting\nTraceback (most recent call last):\n")
    assert termination_log.read_text() == "ValueError: head_dim 72"


def test_a_server_that_ends_well_without_being_told_to_has_failed(termination_log: Path) -> None:
    server = "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()"
    assert serve(server, termination_log)[0] == 0
    assert termination_log.read_text() == "ZeroDivisionError: division by zero"


def test_without_an_exception_the_log_speaks_for_itself(termination_log: Path) -> None:
    assert serve("import sys; sys.exit('turboquant: unknown format')", termination_log)[0] == 1
    assert termination_log.read_text() == ""


def test_no_termination_log_is_made_outside_kubernetes(tmp_path: Path) -> None:
    assert serve("raise ValueError", tmp_path / "absent")[0] == 1
    assert not (tmp_path / "absent").exists()


def test_a_server_that_a_signal_killed_exits_as_in_a_shell(termination_log: Path) -> None:
    assert serve("import os; os.kill(os.getpid(), 9)", termination_log)[0] == 128 + signal.SIGKILL


def test_output_of_any_kind_comes_through_unchanged(termination_log: Path) -> None:
    server = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 2000 + b'no newline')"
    command = [sys.executable, "-c", SERVE, server, str(termination_log)]
    assert subprocess.run(command, stdout=subprocess.PIPE).stdout == bytes(range(256)) * 2000 + b"no newline"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_has_not_failed(termination_log: Path, number: int) -> None:
    server = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    server += "def stop(*_): raise RuntimeError('stopped')\nsignal.signal(signal.SIGTERM, stop)\n"
    server += "print('up')\nsignal.pause()"
    with start(server, termination_log) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert "Traceback" in output  # the server got the signal
    assert termination_log.read_text() == ""


def test_a_process_that_outlives_the_server_does_not_keep_the_container(termination_log: Path) -> None:
    server = "import subprocess, sys\nleft = subprocess.Popen(['sleep', '60'])\n"
    server += "print(left.pid)\nraise RuntimeError('engine died')"
    begun = time.monotonic()
    with start(server, termination_log) as process:
        assert process.stdout is not None
        left = int(process.stdout.readline())
        assert process.wait(timeout=30) == 1
        os.kill(left, signal.SIGKILL)
    assert time.monotonic() - begun < 30
    assert termination_log.read_text() == "RuntimeError: engine died"
