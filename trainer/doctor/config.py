"""Configuration of `recpress doctor`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from recpress.data.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check that recpress can run here: versions, devices, communication backends, write access, collective latency.

    Exits with status 1 if a check fails. Under torchrun it checks every rank and measures collectives between them;
    otherwise it measures them between two gloo ranks on this machine.
    """

    json: bool = False
    """Print the result as JSON."""
    timeout_seconds: float = 60.0
    """Time limit for the two ranks on this machine to start and measure."""

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise InputError(f"timeout_seconds is {self.timeout_seconds}, expected a number above 0")
