"""Runs a rehearsal's child on pretend GPUs until it ends, and gathers its results."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from turbofit.core.process.progress import Step, listening, tell
from turbofit.core.struct import Document, to_json
from turbofit.rehearsal.notes import read_notes
from turbofit.rehearsal.pretend.command import CHANGING, find_turbofit, put_first
from turbofit.rehearsal.pretend.record import processes_in
from turbofit.rehearsal.pretend.run import FinishedRun, run_pretend
from turbofit.rehearsal.spec import Spec

#: Beginnings of the environment variables that a rehearsal removes: such variables, also Ray's,
#: change what an engine allocates.
_DROPPED: Final = (*CHANGING, "RAY_")
#: Environment variables that a rehearsal keeps all the same, since servers run with them. The
#: document of the rehearsal states their values.
KEPT: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LOOK: Final = 0.5  # seconds between two looks at the child
#: A case may take its limit of seconds this many times, as long as the engine works.
LIMITS_WHILE_ACTIVE: Final = 5
# TurboMind prints this line when it can admit no request. In a warm-up without enough cache it
# repeats the line for ever: with one rank 36,000 times a second, with many ranks on few cores
# less often.
_STUCK: Final = "out of memory at 0/"
_STUCK_LINES: Final = 60
_STUCK_LOOKS: Final = 2
_FIRST_LINES: Final = 2000
_LAST_LINES: Final = 4000
_LONGEST_LINE: Final = 4000
#: Signals by which a person or a service ends this process and its child.
_STOPPED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class EndedRun:
    """A rehearsal that has ended.

    Attributes:
        log: the first and the last lines of the child's output and of the engine's log.
        stopped: why the parent ended the run: ``stuck`` (TurboMind's silent hang at start-up),
          ``idle`` (no progress for too long). Empty: the run ended by itself.
        folder: the folder of timelines and records.
    """

    spec: Spec
    ran: FinishedRun
    notes: Document
    log: list[str]
    stopped: str
    folder: Path


@dataclass
class Readings:
    """The memory and the end of a rehearsal's run; lists are by card, sizes in bytes.

    Attributes:
        phases: the memory in each phase, in the order of the phases: ``peak``, ``held`` (at the
          end of the phase), and the engine's own counters.
        terms: the bytes of the engine's own counters; each counter has the name of a term or case.
        cache: the cache as the engine divided it: ``free``, ``region``, ``object_size``,
          ``slab_size``, ``tokens``.
        cards: more facts of each card, for the document.
        end: fields of an `End`; not used if all requests were served. The kind is
          ``out_of_memory`` if an allocation was refused.
        pinned: the most page-locked host memory in each phase; empty without a counter.
    """

    phases: list[dict[str, dict[str, Any]]]
    terms: list[dict[str, int]]
    cache: dict[str, Any]
    cards: list[dict[str, Any]]
    end: dict[str, Any]
    pinned: Mapping[str, int] = field(default_factory=dict)


def run_child(
    spec: Spec,
    folder: Path,
    environ: Mapping[str, str],
    path: tuple[Path, ...],
    library: Path | None = None,
) -> EndedRun:
    """Run a rehearsal's child until it and all processes that it started have ended.

    ``folder`` is a new folder. The folders in ``path`` come first on the child's ``PYTHONPATH``.
    ``library`` is the engine's library whose calls the record names.

    Raises:
        KeyboardInterrupt: a signal ended the child, and is meant to end this process, too.
        PretendError: the pretend libraries cannot be built.
    """
    (folder / "spec.json").write_text(to_json(spec), encoding="utf-8")
    watch = _Watch(spec, folder)
    ran = run_pretend(
        [sys.executable, "-m", "turbofit.rehearsal.child", str(folder)],
        spec.machine,
        keep=folder / "pretend",
        stdout=2,
        every=_LOOK,
        tick=watch,
        base=_environment(folder, {**environ, **spec.environ}, path),
        library=library,
    )
    if -ran.code in _STOPPED:
        raise KeyboardInterrupt
    return EndedRun(spec, ran, read_notes(folder), read_log(folder / "log"), watch.stopped, folder)


def _environment(
    folder: Path, variables: Mapping[str, str], path: tuple[Path, ...]
) -> dict[str, str]:
    """Return the environment of a rehearsal's child."""
    env = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(_DROPPED)}
    env |= variables
    for place in path:
        put_first(env, "PYTHONPATH", str(place))
    find_turbofit(env)
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return env | {"TURBOFIT_REHEARSAL": str(folder), **dict.fromkeys(offline, "1")}


class InactivityTimer:
    """Measures the seconds since the last change of a value, such as the number of CUDA calls.

    A slow engine on a busy machine still changes the value, so it does not count as hanging.
    """

    def __init__(
        self, look: Callable[[], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look, self._clock = look, clock
        self._value = look()
        self._started = self._changed = clock()

    def inactive(self) -> float:
        now, value = self._clock(), self._look()
        if value != self._value:
            self._value, self._changed = value, now
        return now - self._changed

    def elapsed(self) -> float:
        return self._clock() - self._started


class _Watch:
    """Ends the processes of a rehearsal if the rehearsal hangs; ``stopped`` then says why.

    A rehearsal hangs if it makes no allocation and no note for too long, or if its log repeats
    `_STUCK`.
    """

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.stopped = ""
        self._spec, self._folder = spec, folder
        self._timer = InactivityTimer(lambda: _progress(folder))
        self._stuck = 0

    def __call__(self) -> None:
        """Look at the child's notes and log; end all processes if the rehearsal hangs."""
        notes = read_notes(self._folder)
        _tell(self._spec, notes)
        ready = "ready" in notes.get("seconds", {})
        self._stuck = self._stuck + 1 if not ready and _is_stuck(self._folder / "log") else 0
        case = self._spec.case_seconds * LIMITS_WHILE_ACTIVE + 10
        if self._stuck >= _STUCK_LOOKS:
            self.stopped = "stuck"
        elif self._timer.inactive() > (case if ready else self._spec.start_seconds):
            self.stopped = "idle"
        if not self.stopped:
            return
        shared = processes_in(self._folder / "pretend")
        pids = {process.pid for process in shared.processes if process.alive}
        if "pid" in notes:
            pids.add(notes["pid"])
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _progress(folder: Path) -> tuple[int, ...]:
    """Return values that change while a child works: its timelines' disk use, its notes' time."""
    figures = []
    for path in (folder / "report.json", *(folder / "pretend" / "timelines").glob("*")):
        with contextlib.suppress(OSError):
            stat = path.stat()
            figures += [stat.st_blocks, stat.st_mtime_ns if path.suffix == ".json" else 0]
    return tuple(figures)


def _is_stuck(log: Path) -> bool:
    """Return whether the log's last lines all say that the scheduler is out of memory."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - (1 << 15)))
            lines = file.read().decode("utf-8", "replace").splitlines()[-_STUCK_LINES - 1 : -1]
    except OSError:
        return False
    return len(lines) == _STUCK_LINES and all("out of memory at" in line for line in lines)


def _tell(spec: Spec, notes: Document) -> None:
    """Report the progress of a rehearsal."""
    if not listening():
        return
    if str(notes.get("phase", "")).startswith("case "):
        done = len(notes.get("cases", ()))
        tell(Step("rehearsing worst cases on pretend GPUs", done, len(spec.cases)))
    else:
        tell(Step("starting the engine on pretend GPUs"))


def read_log(path: Path) -> list[str]:
    """Return the first and the last lines of a log.

    Progress bars are left out, and all but the first 20 lines of a hang (`_STUCK`).
    """
    first_lines: list[str] = []
    last_lines = deque[str](maxlen=_LAST_LINES)
    stuck = 0
    try:
        with path.open("rb") as file:
            for line in file:
                text = re.sub(r".*\r(?!$)", "", line.decode("utf-8", "replace").rstrip("\r\n"))
                stuck = stuck + 1 if _STUCK in text else 0
                if stuck <= 20:
                    lines = first_lines if len(first_lines) < _FIRST_LINES else last_lines
                    lines.append(text[:_LONGEST_LINE])
    except OSError:
        return []
    return [*first_lines, *last_lines]
