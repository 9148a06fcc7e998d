"""Logs to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from turbofit.logs.answer import Diagnosis
from turbofit.logs.explain import diagnose

_T = TypeVar("_T")
LOGS = Path(__file__).parent / "logs"


def explain(text: str, **options: Any) -> Diagnosis:
    """Diagnose a text."""
    return diagnose([text.encode()], **options)


def explain_file(name: str, **options: Any) -> Diagnosis:
    """Diagnose one of the fixtures."""
    return diagnose([(LOGS / f"{name}.log").read_bytes()], **options)


def message(diagnosis: Diagnosis) -> str:
    """The name of what is answered: a cause, or a message that does not tell its cause."""
    return diagnosis.others.message if diagnosis.others else diagnosis.kind


def tried(diagnosis: Diagnosis) -> tuple[str, ...]:
    """What to change, or what others tried."""
    return diagnosis.others.tried if diagnosis.others else diagnosis.changes


def some(value: _T | None) -> _T:
    """A part of an answer that must be there."""
    assert value is not None
    return value
