"""A device that is lost to this process."""

from __future__ import annotations

STICKY = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "illegal instruction",
    "launch timed out",
    "uncorrectable",
    "unknown error",
)
"""What CUDA says when nothing works any more in this process. A capture that fails is not among it."""


def is_lost(error: BaseException) -> bool:
    """Whether the device cannot be used any more by this process."""
    return isinstance(error, RuntimeError) and any(what in str(error) for what in STICKY)
