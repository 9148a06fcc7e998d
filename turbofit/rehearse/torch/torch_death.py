"""How a torch engine's rehearsal ended: its outcome, and the death in torch's own words."""

from __future__ import annotations

import re
from typing import Any, Final

from turbofit.core.json_types import Document
from turbofit.pretend.report import report as run_report
from turbofit.rehearse.torch.torch_run import EndedRehearsal

__all__ = ["outcome_and_death"]

_OOM: Final = re.compile(r"OutOfMemoryError: (CUDA out of memory\..*)")
_OOM_TEXT: Final = "CUDA out of memory."
_SIZING: Final = re.compile(r"No enough gpu memory for (kv cache|runtime)\.")
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_DEAD: Final = frozenset({"unavailable", "internal_error"})
_REFUSED: Final = frozenset({"refused", "too_long"})
_NOT_THEIRS: Final = ("/torch/", "/turbofit/pretend/", "/turbofit/rehearse/", "turbofit_values")
_MOST_FRAMES: Final = 4
#: Errors of settings that the engine does not take, before it touches a card.
_REFUSING: Final = (
    "AssertionError",
    "NotImplementedError",
    "TypeError",
    "UsageError",
    "ValueError",
)


def outcome_and_death(seen: EndedRehearsal) -> tuple[str, Document | None]:
    """The outcome (served, out_of_memory, hang, failed, refused) and the death, if there was one.

    ``refused``: the engine did not take the settings, or it lives and does not take a request with
    pictures (too long for its cache, for example). ``served``: every request came to an end.
    """
    told = seen.report
    cases = told.get("cases", [])
    last = next((case for case in cases if _DEAD & set(case["statuses"])), None)
    unfinished = next((case for case in cases if "not finished" in case["statuses"]), None)
    if told.get("done") and seen.ran.code == 0 and last is None and unfinished is None:
        return _alive(seen, cases)
    error = told.get("error")
    phase = f"case {last['name']}" if last else (error or told).get("phase", "import")
    lines = seen.log.splitlines()
    said = _words(error, lines)
    death = _death(seen, phase, said, lines)
    if said and (_OOM_TEXT in said or _SIZING.search(said)):
        return "out_of_memory", death
    if seen.late or unfinished is not None:
        return "hang", death | {"phase": phase if unfinished is None else unfinished["name"]}
    if error and error["phase"] in ("import", "build") and error["type"] in _REFUSING:
        return "refused", death
    return "failed", death


def _alive(seen: EndedRehearsal, cases: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    for case in cases:
        if case["name"].startswith("vision") and set(case["statuses"]) <= _REFUSED:
            said = f"{' '.join(case['statuses'])}: {case['words']}"
            return "refused", _death(seen, f"case {case['name']}", said, [])
    return "served", None


def _words(error: dict[str, Any] | None, lines: list[str]) -> str:
    """The engine's own message: torch's, where there is one."""
    if error and _OOM_TEXT in error["message"]:
        return str(error["message"])
    for line in reversed(lines):
        found = _OOM.search(line) or _SIZING.search(line)
        if found:
            return found[1] if found.re is _OOM else found[0]
    if error:
        return f"{error['type']}: {error['message']}"
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _death(seen: EndedRehearsal, phase: str, said: str, lines: list[str]) -> dict[str, Any]:
    refused = run_report(seen.ran)["refused"] if _OOM_TEXT in said else None
    refused = refused or {}
    return {
        "phase": phase,
        "gpu": refused.get("gpu"),
        "pid": refused.get("pid"),
        "command": refused.get("command"),
        "asked": refused.get("asked"),
        "left": refused.get("left"),
        "refused": refused.get("count"),
        "where": _where(seen.report.get("error"), said, lines),
        "message": said,
        "afterwards": seen.report.get("afterwards"),
    }


def _where(error: dict[str, Any] | None, said: str, lines: list[str]) -> list[str]:
    """The innermost lines of Python that are neither torch's nor ours, innermost first."""
    if error and said in error["message"]:
        frames = list(error["frames"])
        return _useful(list(reversed(frames)))
    at = max((i for i, line in enumerate(lines) if said and said[:60] in line), default=0)
    frames = []
    for line in reversed(lines[max(0, at - 200) : at]):
        if "Traceback (most recent call last)" in line and frames:
            break
        if found := _FRAME.search(line):
            frames.append(f"{found[1]}:{found[2]} {found[3]}")
    return _useful(frames)


def _useful(frames: list[str]) -> list[str]:
    engine_frames = [frame for frame in frames if not any(part in frame for part in _NOT_THEIRS)]
    return [_short(frame) for frame in (engine_frames or frames)[:_MOST_FRAMES]]


def _short(frame: str) -> str:
    """Without the folder of packages."""
    return frame.rpartition("site-packages/")[2] or frame
