"""vLLM's CUDA platform with compressed caches."""

from vllm.platforms.cuda import CudaPlatform

from turboquant_runtime.adapters.platform import CompressedCaches


class CompressedCUDAPlatform(CompressedCaches, CudaPlatform):
    compressed_backend = "turboquant_runtime.backends.cuda.CompressedCUDABackend"
