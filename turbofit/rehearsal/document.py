"""One rehearsal, from its specification to its document ``turbofit.rehearsal/1``; in bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.engine_end import End, exit_words
from turbofit.core.json_types import Document
from turbofit.core.rehearsal import Moment
from turbofit.core.struct import to_builtins
from turbofit.core.version import __version__
from turbofit.rehearsal.engines import ADAPTERS
from turbofit.rehearsal.notes import DEAD, NOT_FINISHED
from turbofit.rehearsal.packages import needs
from turbofit.rehearsal.pretend.run import NOTICE
from turbofit.rehearsal.pretend.scenario import PretendGpu
from turbofit.rehearsal.run import KEPT, EndedRun, Readings, run_child
from turbofit.rehearsal.spec import Spec

SCHEMA: Final = "turbofit.rehearsal/1"
#: The beginning of names of phases whose worst cases have images.
_IMAGES: Final = "case vision"
#: The phase that begins when an engine reads free memory.
_SIZED: Final = "cache"
_KEPT_LINES: Final = 12


def rehearse(spec: Spec, keep: Path | None = None) -> Document:
    """Run a rehearsal and return its document; ``keep``: a folder for timelines, notes and log.

    Raises:
        PackageError: the engine, a package that it runs, or a C compiler is missing.
    """
    adapter, versions = ADAPTERS[spec.engine], needs(spec)
    folder = Path(tempfile.mkdtemp(prefix="turbofit-rehearsal-"))
    try:
        ended = run_child(spec, folder, adapter.environ, adapter.path)
        document = report(ended, adapter.read(ended), versions)
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
            document["files"] = str(keep)
        return document
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(ended: EndedRun, readings: Readings, versions: Mapping[str, str]) -> Document:
    outcome, end = outcome_and_end(ended, readings)
    notes, gpus = ended.notes, ended.spec.machine.gpus
    return {
        "schema": SCHEMA,
        "turbofit_version": __version__,
        "pretend": NOTICE,
        "engine": ended.spec.engine,
        "outcome": outcome,
        "death": None if end is None else to_builtins(end),
        "ended": exit_words(ended.ran.code),
        "seconds": ended.ran.seconds,
        "child_seconds": notes.get("seconds", {}),
        "versions": dict(versions),
        "environment": {name: os.environ[name] for name in KEPT if name in os.environ},
        "settings": notes.get("settings") or dict(ended.spec.settings),
        "cache": readings.cache,
        "terms": readings.terms,
        "gpus": [
            card | {"phases": phases}
            for card, phases in zip(readings.cards, readings.phases, strict=True)
        ],
        "cases": [_case(case, readings) for case in notes.get("cases", [])],
        "timeline": [to_builtins(moment) for moment in moments(readings.phases, gpus)],
        "pinned": dict(readings.pinned),
        "not_known": list(ADAPTERS[ended.spec.engine].not_known),
        "error": notes.get("error"),
        "log": ended.log[-_KEPT_LINES:],
    }


def _case(case: Mapping[str, Any], readings: Readings) -> dict[str, Any]:
    """A case with the most that each card held, and the engine's counters of it."""
    phase = f"case {case['name']}"
    return {
        **case,
        "peak": [phases.get(phase, {}).get("peak", 0) for phases in readings.phases],
        "transient": [terms.get(case["name"], 0) for terms in readings.terms],
        "pinned": readings.pinned.get(phase, 0),
    }


def outcome_and_end(ended: EndedRun, readings: Readings) -> tuple[str, End | None]:
    """The outcome (served, out_of_memory, hang or failed), and the end unless it is served.

    ``served``: every request came to an end, even if the engine refused its prompt.
    """
    cases = ended.notes.get("cases", [])
    unfinished = next((case["name"] for case in cases if NOT_FINISHED in case["statuses"]), None)
    dead = any(case["statuses"].keys() & DEAD for case in cases)
    served = ended.notes.get("done") and ended.ran.code == 0
    if served and unfinished is None and not dead and not ended.stopped:
        return "served", None
    end = convert(readings.end, End)
    if end.kind == "out_of_memory":
        return "out_of_memory", end
    if ended.stopped == "idle":
        end = replace(end, kind="hang", where="nothing happened any more")
    elif unfinished is not None:
        phase, where = f"case {unfinished}", "not finished in time"
        end = replace(end, kind="hang", phase=phase, where=where)
    return "hang" if end.kind == "hang" else "failed", end


def moments(phases: Sequence[Document], gpus: Sequence[PretendGpu]) -> tuple[Moment, ...]:
    """The phases in order, from each card's ``peak`` and ``held``, plus the bytes charged to it."""
    order, lanes = max(phases, key=len, default={}), []  # all cards have the same phases
    for spans, gpu in zip(phases, gpus, strict=True):
        base, in_use, lane = gpu.used, 0, []
        for phase in order:
            base += gpu.late if phase == _SIZED else 0
            span = spans.get(phase, {"peak": in_use, "held": in_use})  # without it: no change
            in_use = span["held"]
            lane.append((base + span["peak"], base + in_use))
        lanes.append(lane)
    return tuple(
        Moment(
            phase=phase,
            peak=tuple(lane[i][0] for lane in lanes),
            end=tuple(lane[i][1] for lane in lanes),
            image=phase.startswith(_IMAGES),
        )
        for i, phase in enumerate(order)
    )
