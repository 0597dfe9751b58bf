"""What is raised for a checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that cannot be saved, loaded or converted; says what of it, and what to do.

    Both kinds, so that it is caught as the error of a bad value and as that of a failed operation.
    """
