"""Decode attention for Hopper: `kernel` says how it works, `attend` launches it, `launch` says what it reads.

Of the modules with Gluon in them nothing is imported here: `attend` is, where the kernel runs.
"""

from turboquant_kernels.decode.hopper.launch import HEAD_DIMS, Launch, launch_of, supports, value_unit

__all__ = ["HEAD_DIMS", "Launch", "launch_of", "supports", "value_unit"]
