"""Every touch of vLLM's internals.

`platform` with `platform_cpu` and `platform_cuda` is what vLLM asks of a platform, `specs` what a layer's
pages take, `patches` what has no hook; `engine_config` reads vLLM's configuration and `baseline` lays an
uncompressed cache out, without changing anything.
"""
