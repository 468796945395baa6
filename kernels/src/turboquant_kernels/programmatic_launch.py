"""Programmatic dependent launch (PDL): kernels that are launched before the one ahead of them has ended.

From sm_90 on CUDA hides a launch's way to the GPU, a microsecond or two, behind the kernel before. A kernel
that is launched so has a constexpr `PDL`, is launched with `launch_pdl`, and keeps to two rules:

- `gdc_launch_dependents`, which lets the next kernel come before this one has ended, stands behind `gdc_wait`
  only, which returns once the kernel ahead has ended. So a running kernel has at most one unfinished kernel
  ahead of it. A kernel that is launched in the usual way has none, and may call it anywhere.
- Before `gdc_wait` it touches no memory that the kernel ahead may touch, unless both only read it.

Decode attention is launched in the usual way; docs/kernels.md says what was measured.
"""

from functools import cache

import torch
import triton

LEAST_CAPABILITY = 90
"""Compute capability, times ten, from which GPUs have it."""


@cache
def uses_pdl(device: torch.device) -> bool:
    """Whether kernels on a device are launched so."""
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= LEAST_CAPABILITY
