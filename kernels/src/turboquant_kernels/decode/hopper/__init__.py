"""Decode attention for Hopper: `launch` has what is called from outside, `kernel` says how it works."""

from turboquant_kernels.decode.hopper.launch import (
    HEAD_DIMS,
    Launch,
    Merged,
    attend_items,
    launch_of,
    supports,
    value_unit,
    variants,
)

__all__ = ["HEAD_DIMS", "Launch", "Merged", "attend_items", "launch_of", "supports", "value_unit", "variants"]
