"""Kernels that are launched before the one ahead of them has ended (sm_90 and newer).

CUDA's programmatic dependent launch: the way of a launch to the GPU, a microsecond or two, is hidden behind
the kernel before. What is launched so has a constexpr `OVERLAP`, is launched with `launch_pdl`, and keeps to
two rules:

- `gdc_launch_dependents`, which lets the next one come before this one has ended, comes after `gdc_wait`
  only, which returns once the kernel ahead has ended. So whatever runs can have but one kernel ahead of it.
  A kernel that is launched in the usual way has none, and may call it anywhere.
- Before `gdc_wait` it touches no memory that the one ahead may touch, unless both only read it.

Decode attention is launched in the usual way; docs/kernels.md says what was measured.
"""

from functools import cache

import torch
import triton

LEAST_CAPABILITY = 90
"""Of a GPU, times ten."""


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on a device are launched so."""
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= LEAST_CAPABILITY
