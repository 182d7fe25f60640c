"""Mistakes that a person can fix and that only this package can see."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which one, why, and what to do, in one line."""
