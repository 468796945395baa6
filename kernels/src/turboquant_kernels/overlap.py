"""Kernels that are launched before the one ahead of them has ended (sm_90 and newer).

CUDA's programmatic dependent launch: the way of a launch to the GPU, a microsecond or two, is hidden behind
the kernel before. A kernel that is launched so touches no memory that others write before it has called
`gdc_wait`, which returns once the kernel ahead has ended; that one has waited for those ahead of it in turn.
One that is short calls `gdc_launch_dependents` right then, so that the next comes as early as it can.

Kernels that do have a constexpr `OVERLAP`, and are launched with `launch_pdl`.
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
