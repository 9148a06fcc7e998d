"""Logs to read."""

from __future__ import annotations

import re
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


def against(found: Diagnosis, log: str) -> str:
    """What the first step goes against; empty if nothing."""
    first, advice = found.first, found.would_work
    listed = (*found.changes, *(found.others.tried if found.others else ()), *found.send)
    if first and first not in listed:
        return "the list"
    for name, value in re.findall(r"\b([A-Z][A-Z0-9_]+)=([\w.:]+)", first):
        if re.search(rf"(?<!with )\b{name}=['\"]?{re.escape(value)}\b", log):
            return "the log, which has the variable"
    if "PYTHONFAULTHANDLER" in first and "Fatal Python error" in log:
        return "the log, which has the stack"
    if advice is None:
        return ""
    if advice.fits is False and re.search("cache[-_]max[-_]entry[-_]count", first):
        return "the plan, which no share helps"
    if advice.fits and re.match("more (GPUs|cards)", first):
        return "the plan, which fits these cards"
    for option, value in re.findall(r"(--[a-z-]+) ([\d.]+)", first):
        name = option.removeprefix("--").replace("-", "_")
        held = advice.settings.get(name, value)
        if advice.fits and str(held) != value:
            return f"the plan, whose {name} is {held}"
    return ""
