"""Measurements: `tq bench`."""
