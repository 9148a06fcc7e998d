"""Starts a rehearsal's child, watches it, and says how it ended."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from turbofit.core.process.log import LazyLogger
from turbofit.core.process.progress import Step, listening, tell
from turbofit.pretend.build import build
from turbofit.pretend.documents import dumped
from turbofit.pretend.environment import cuda_site, find_turbofit, pretend_environment
from turbofit.pretend.scenario_file import write_scenario
from turbofit.pretend.surface import check_surface
from turbofit.rehearse.installed import engine_library
from turbofit.rehearse.turbomind.inactivity import LIMITS_WHILE_ACTIVE, InactivityTimer
from turbofit.rehearse.turbomind.notes import read_notes
from turbofit.rehearse.turbomind.spec import Spec

_LOG: Final = LazyLogger(__name__)

# The scheduler's own line where nothing can be admitted; during warm-up it repeats for ever.
_STUCK = re.compile(rb"out of memory at 0/\d+")
# Many ranks on few cores print the line slowly; one rank prints it 36,000 times a second.
_STUCK_LINES = 60
_STUCK_SECONDS = 0.5
#: How the pretend libraries begin what they say: why they end a process, among others.
_PRETEND = "turbofit pretend:"
_KEPT_LINES = 400
#: What the lines about the cache have: its budget, its slabs, a sequence's state.
_CACHE_WORDS = ("Object cache budget", "slab_size", "[GDN]")


@dataclass
class ChildOutcome:
    """How a child ended.

    Attributes:
        ended: "exit", "signal", "hang" (the silent start-up hang) or "timeout".
        code: exit status, or the signal's number.
        report: what the child reported.
        log: the last lines of its stderr.
        budgets: what it logged about its cache.
        seconds: wall time.
        folder: where timeline, report and log are.
    """

    ended: str
    code: int
    report: dict[str, Any]
    log: list[str]
    budgets: list[str]
    seconds: float
    folder: Path
    fatal: list[str] = field(default_factory=list)


class _Log:
    """Reads the child's stderr: keeps its end, counts the lines of a hang."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._rest = b""
        self.last: deque[str] = deque(maxlen=_KEPT_LINES)
        self.budgets: list[str] = []
        self.fatal: list[str] = []
        self.stuck = 0
        self._since = 0.0

    @property
    def hangs(self) -> bool:
        """Whether the scheduler has printed only this line for a while."""
        return self.stuck >= _STUCK_LINES and time.monotonic() - self._since >= _STUCK_SECONDS

    def feed(self, data: bytes) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if _STUCK.search(line):
                self._since = self._since if self.stuck else time.monotonic()
                self.stuck += 1
                if self.stuck > 20:
                    continue
            elif b"out of memory at" not in line:
                self.stuck = 0
            self._keep(line)

    def _keep(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        text = line.rsplit(b"\r", 1)[-1].decode("utf-8", "replace")  # no progress bars
        self.last.append(text)
        if any(word in text for word in _CACHE_WORDS):
            self.budgets.append(text)
        if "[FATAL]" in text or text.startswith(_PRETEND):
            self.fatal.append(text)

    def close(self) -> None:
        if self._rest:
            self._keep(self._rest)
        self._file.close()


def child_environment(libraries: Path, scenario: Path, site: Path | None = None) -> dict[str, str]:
    """The environment of a rehearsal's child: pretend machine, no hub, one thread of torch."""
    env = pretend_environment(libraries, scenario, site=site)
    env["TM_LOG_LEVEL"] = "INFO"
    env["HF_HUB_OFFLINE"] = env["TRANSFORMERS_OFFLINE"] = "1"
    env["OMP_NUM_THREADS"] = "1"
    find_turbofit(env)
    return env


def run_child(spec: Spec, folder: Path) -> ChildOutcome:
    """Runs a rehearsal's child to its end, in a folder of its own."""
    site = cuda_site()
    libraries = build(site=site)
    check_surface(engine_library(), libraries)
    scenario, timeline = folder / "scenario", folder / "timeline"
    write_scenario(scenario, spec.machine, str(timeline))
    (folder / "spec.json").write_text(dumped(spec), encoding="utf-8")
    begun = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "turbofit.rehearse.turbomind.child",
            str(folder / "spec.json"),
            str(folder / "report.json"),
            str(libraries),
            str(os.getpid()),
        ],
        env=child_environment(libraries, scenario, site),
        stdin=subprocess.DEVNULL,
        stdout=(folder / "stdout").open("wb"),
        stderr=subprocess.PIPE,
        cwd=folder,
        start_new_session=True,
    )
    _LOG.info("rehearsal: process %d in %s", process.pid, folder)
    log = _Log(folder / "stderr")
    try:
        ended = _watch(process, log, spec, folder)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        log.close()
    code = process.returncode
    if ended is None:
        ended = "signal" if code < 0 else "exit"
    seconds = round(time.monotonic() - begun, 3)
    _LOG.info("rehearsal: process %d ended by %s, code %d, %s s", process.pid, ended, code, seconds)
    return ChildOutcome(
        ended=ended,
        code=-code if code < 0 else code,
        report=read_notes(folder),
        log=list(log.last),
        budgets=log.budgets,
        seconds=seconds,
        folder=folder,
        fatal=log.fatal,
    )


def _watch(process: subprocess.Popen[bytes], log: _Log, spec: Spec, folder: Path) -> str | None:
    """Reads stderr until the child ends; kills it where it hangs, and says so.

    A child that allocates, or tells of itself, does not hang, however slow the machine is.
    """
    assert process.stderr is not None
    timer = InactivityTimer(lambda: _progress(folder))
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(timeout=0.2):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    process.wait()
                    return None
                log.feed(data)
            _tell(spec, folder)
            ready = "ready" in read_notes(folder).get("seconds", {})
            if log.hangs and not ready:
                process.kill()
                return "hang"
            limit = spec.case_seconds * LIMITS_WHILE_ACTIVE + 10 if ready else spec.start_seconds
            if timer.inactive() > limit:
                process.send_signal(signal.SIGKILL)
                return "timeout"


def _progress(folder: Path) -> tuple[int, int]:
    """What changes while a child works: the length of its timeline on disk, and its notes."""

    def stat(name: str) -> os.stat_result | None:
        try:
            return (folder / name).stat()
        except OSError:
            return None

    timeline, notes = stat("timeline"), stat("report.json")
    return (timeline.st_blocks if timeline else 0, notes.st_mtime_ns if notes else 0)


def _tell(spec: Spec, folder: Path) -> None:
    """How far the child is, where somebody listens."""
    if not listening():
        return
    notes = read_notes(folder)
    if "running" in notes:
        done = len(notes.get("cases", ()))
        tell(Step("rehearsing worst cases on pretend GPUs", done, len(spec.cases)))
    else:
        tell(Step("starting the engine on pretend GPUs"))


def new_folder(parent: Path | None = None) -> Path:
    """A fresh folder for one rehearsal."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="turbofit-pretend-", dir=parent))
