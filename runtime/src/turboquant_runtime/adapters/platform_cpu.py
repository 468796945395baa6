"""vLLM's CPU platform with compressed caches."""

from vllm.platforms.cpu import CpuPlatform

from turboquant_runtime.adapters.platform import CompressedCaches


class CompressedCPUPlatform(CompressedCaches, CpuPlatform):
    compressed_backend = "turboquant_runtime.backends.cpu.CompressedCPUBackend"
