"""A check's answer, and the report of all of them."""

from __future__ import annotations

from typing import Final, Literal

from turbofit.core.struct import Struct

__all__ = [
    "DOCTOR_SCHEMA",
    "DoctorReport",
    "Finding",
    "State",
    "ok",
    "stops",
    "unreadable",
    "warning",
]

DOCTOR_SCHEMA: Final = "turbofit.doctor/1"

State = Literal["ok", "warning", "stops", "unreadable"]

_STOPS: Final = 3
_NO_MACHINE: Final = 4


class Finding(Struct):
    """``check`` is stable for scripts. ``why`` says what it matters for here, ``fix`` what to do.

    What could not be read is ``unreadable``, never ``ok``.
    """

    check: str
    state: State
    seen: str
    why: str = ""
    fix: str = ""


class DoctorReport(Struct):
    """All findings. ``machine`` is its name, or None where it could not be read."""

    schema: str = DOCTOR_SCHEMA
    machine: str | None
    source: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """4 without a readable machine, 3 where something stops serving, else 0."""
        if self.machine is None:
            return _NO_MACHINE
        return _STOPS if any(one.state == "stops" for one in self.findings) else 0

    def count(self, state: State) -> int:
        """Findings of a state."""
        return sum(one.state == state for one in self.findings)


def ok(check: str, seen: str) -> Finding:
    """Nothing wrong."""
    return Finding(check=check, state="ok", seen=seen)


def warning(check: str, seen: str, why: str, fix: str) -> Finding:
    """Serving works, but slower, with less memory, or at a risk."""
    return Finding(check=check, state="warning", seen=seen, why=why, fix=fix)


def stops(check: str, seen: str, why: str, fix: str) -> Finding:
    """Serving does not work like this."""
    return Finding(check=check, state="stops", seen=seen, why=why, fix=fix)


def unreadable(check: str, seen: str, why: str, fix: str = "") -> Finding:
    """Nobody knows; ``why`` says what hides behind it."""
    return Finding(check=check, state="unreadable", seen=seen, why=why, fix=fix)
