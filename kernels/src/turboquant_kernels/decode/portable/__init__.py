"""Decode attention on any GPU: `launch` has what is called from outside, `kernel` says how it works."""

from turboquant_kernels.decode.portable.launch import Launch, attend_items, launch_of, value_unit

__all__ = ["Launch", "attend_items", "launch_of", "value_unit"]
