"""Queries on their way into decode attention, and its output on the way back."""
