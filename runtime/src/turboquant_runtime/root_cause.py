"""Why an engine ended, read off its output: lines of vLLM's log to a few sentences. Pure.

vLLM prints the traceback of the process that failed, then those of the processes that waited for it, each of
several kilobytes. A container's last 2,048 bytes, which is what the kubelet keeps of them, hold the end of
the last one alone: "Engine core initialization failed. See root cause above." `serve` feeds every line to a
`RootCause` and leaves its message where the kubelet looks first.
"""

import re
from dataclasses import dataclass, field

MESSAGE_CHARACTERS = 600
"""Longest message. It is shown in one condition of a Kubernetes object; some exceptions name every model that
vLLM knows, in 12,000 characters."""

RECENT_SECONDS = 60.0
"""Exceptions that lie further back did not end the engine: servers print one for many a bad request."""

_PREFIX = re.compile(r"(\([\w-]+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
"""What vLLM puts before each line: the process, then level, time and place where a logger wrote it."""

_TRACEBACK = "Traceback (most recent call last):"

_PASSED_ON = "root cause"
"""In the text of every exception with which vLLM tells that another process has failed."""


@dataclass
class _Exception:
    """An exception as its traceback ended: `KeyError: 'lm_head.weight'`, and indented lines after it."""

    text: str
    seen: float
    """Seconds on the clock that `RootCause.feed` is given."""


@dataclass
class RootCause:
    """The exceptions in the lines fed so far: the first two of the last minute and the newest."""

    _exceptions: list[_Exception] = field(default_factory=list)
    _tracebacks: dict[str, _Exception | None] = field(default_factory=dict)
    """By process: the exception of the traceback that it is printing; None before the traceback's end."""

    def feed(self, line: str, now: float) -> None:
        """Takes one line of output without its end; `now` in seconds on any steady clock."""
        if not self._tracebacks and _TRACEBACK not in line:
            return
        prefix = _PREFIX.match(line)
        assert prefix is not None  # it matches the empty prefix
        process, text = prefix[1] or "", line[prefix.end() :].rstrip()
        if text == _TRACEBACK:
            self._tracebacks[process] = None
        elif process in self._tracebacks:
            self._continue(process, text, now)

    def _continue(self, process: str, text: str, now: float) -> None:
        """A line of a process that is printing a traceback, or the lines of an exception after it."""
        exception, indented = self._tracebacks[process], text.startswith(" ")
        if exception is None and not indented:
            self._tracebacks[process] = self._remember(_Exception(text, now))
        elif exception is not None and indented:
            exception.text += "\n" + text.strip()
        elif exception is not None:
            del self._tracebacks[process]

    def _remember(self, exception: _Exception) -> _Exception:
        recent = [known for known in self._exceptions if exception.seen - known.seen <= RECENT_SECONDS]
        if not any(known.text.partition("\n")[0] == exception.text for known in recent):
            # A failing engine fails every request that it had: those between first and last tell nothing new.
            self._exceptions = [*recent[:2], exception]
        return exception

    def message(self, now: float) -> str:
        """What ended an engine that ends `now`, oldest exception first; empty where none was printed."""
        texts = [each.text for each in self._exceptions if now - each.seen <= RECENT_SECONDS]
        texts = [text for text in texts if _PASSED_ON not in text] or texts
        share = MESSAGE_CHARACTERS // max(1, len(texts)) - 1
        return "\n".join(text if len(text) <= share else text[: share - 3] + "..." for text in texts)
