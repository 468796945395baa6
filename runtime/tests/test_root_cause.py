"""What is read off a failing engine's output, in the form in which vLLM prints it."""

import pytest

from turboquant_runtime.root_cause import MESSAGE_CHARACTERS, RECENT_SECONDS, RootCause

LOGGED = "(EngineCore pid=71) ERROR 11-24 14:16:44 [core.py:1231] "
CORE = "(EngineCore pid=71) "
SERVER = "(APIServer pid=1) "
TRACEBACK = "Traceback (most recent call last):"
TOO_SMALL = "ValueError: To serve at least one request, 0.01 GiB KV cache is needed. Try increasing it."
PASSED_ON = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def traceback(prefix: str, *exception: str) -> list[str]:
    """A traceback of one frame as the process with this prefix prints it; loggers end lines with CR LF."""
    lines = [TRACEBACK, '  File "core.py", line 1200, in run', "    engine = Core()", "             ^^^^^^"]
    return [f"{prefix}{line}\r" for line in (*lines, *exception)]


def message(*outputs: list[str]) -> str:
    """The message after these pieces of output, all within one second."""
    cause = RootCause()
    for lines in outputs:
        for line in lines:
            cause.feed(line, now=0.0)
    return cause.message(now=1.0)


def test_the_failed_process_speaks_and_not_the_one_that_waited_for_it() -> None:
    output = [
        ["INFO 11-24 14:16:41 [core.py:105] Initializing a V1 LLM engine", f"{LOGGED}EngineCore failed."],
        traceback(LOGGED, TOO_SMALL),
        [f"{CORE}Process EngineCore:"],
        traceback(CORE, TOO_SMALL),
        traceback(SERVER, PASSED_ON),
        ["resource_tracker: There appear to be 1 leaked shared_memory objects"],
    ]
    assert message(*output) == TOO_SMALL


def test_an_exception_that_passes_on_another_is_better_than_nothing() -> None:
    assert message(traceback(SERVER, PASSED_ON)) == PASSED_ON


def test_causes_and_consequences_of_one_process_are_told_in_order() -> None:
    chained = [
        f"{LOGGED}\r",
        f"{LOGGED}The above exception was the direct cause of the following exception:\r",
    ]
    output = [traceback(LOGGED, "KeyError: 'lm_head'"), chained, traceback(LOGGED, "OSError: no weights")]
    assert message(*output) == "KeyError: 'lm_head'\nOSError: no weights"


def test_indented_lines_belong_to_the_exception() -> None:
    lines = [
        "pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, no FooForCausalLM",
    ]
    assert message(traceback(SERVER, *lines)) == f"{lines[0]}\n{lines[1].strip()}"


def test_processes_may_print_at_once() -> None:
    first, second = traceback("(Worker_TP0 pid=8) ", "A: 1"), traceback("(Worker_TP1 pid=9) ", "B: 2")
    assert message([line for pair in zip(first, second, strict=True) for line in pair]) == "A: 1\nB: 2"


def test_a_wordy_exception_is_cut_at_its_end() -> None:
    text = message(traceback(SERVER, "ValueError: FooForCausalLM is none of " + "BarForCausalLM, " * 800))
    assert text.startswith("ValueError: FooForCausalLM is none of BarForCausalLM, ")
    assert text.endswith("...")
    assert len(text) < MESSAGE_CHARACTERS


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_the_message_is_bounded_and_holds_the_first_and_the_newest(count: int) -> None:
    text = message(*(traceback(SERVER, f"Error{index}: " + "x" * 400) for index in range(count)))
    assert len(text) <= MESSAGE_CHARACTERS
    assert text.startswith("Error0: ")
    assert f"Error{count - 1}: " in text


def test_what_was_printed_long_before_is_not_the_cause() -> None:
    cause = RootCause()
    for line in traceback(SERVER, "BadRequest: no such model"):
        cause.feed(line, now=0.0)
    for line in traceback(LOGGED, "RuntimeError: out of memory"):
        cause.feed(line, now=RECENT_SECONDS + 1)
    assert cause.message(now=RECENT_SECONDS + 2) == "RuntimeError: out of memory"
    assert cause.message(now=3 * RECENT_SECONDS) == ""


def test_output_without_a_traceback_has_no_cause() -> None:
    assert (
        message([f"{SERVER}turboquant: --block-size 24 is not a multiple of 16", "  indented", "E: 1"]) == ""
    )
