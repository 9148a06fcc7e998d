"""What the sweep of allocations starts: whole lives of TurboMind, one for each failure.

A life is a rehearsal from the first import to the end of the worst request, with an allocation
in it that fails. What happened is in the life's own timeline; what turbofit says is from the log.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from bench.faults.allocation_configs import Config, Ended, Point
from bench.faults.forkserver import BOUND, ForkServer
from turbofit.diagnose.answer import Diagnosis
from turbofit.diagnose.explain import diagnose
from turbofit.pretend.scenario import Scenario
from turbofit.pretend.symbols import Symbols
from turbofit.pretend.timeline import PINNED, Event, read_timeline
from turbofit.rehearse.checkpoint.twin import write_checkpoint
from turbofit.rehearse.installed import engine_library
from turbofit.rehearse.turbomind.ledger import Ledger
from turbofit.rehearse.turbomind.sites import CallSites
from turbofit.rehearse.turbomind.spec import RehearsalCase, RehearsalRequest, Spec

__all__ = ["TurboMindLives", "judged", "stand_in_checkpoint"]

#: How the pretend driver begins what it prints: nobody's real log has it.
_OURS = b"turbofit pretend:"


def _diagnosis(config: Config, log: bytes) -> Diagnosis:
    """The diagnosis of a log as a person would paste it: the command, and no word of ours."""
    backend = "" if config.engine == "turbomind" else f" --backend {config.engine}"
    tp = len(config.gpus)
    command = f"$ lmdeploy serve api_server {config.model} --tp {tp}{backend}\n"
    if config.engine == "transformers":
        command = f"$ python generate.py --model {config.model}\n"
    real = b"\n".join(line for line in log.splitlines() if not line.startswith(_OURS))
    return diagnose([command.encode(), real], on=config.on)


def stand_in_checkpoint(config: Config, checkpoints: Path) -> Path:
    """The folder of the model's stand-in checkpoint, written where it is missing."""
    folder = checkpoints / config.model
    if not folder.exists():
        write_checkpoint(config.model, folder)
    return folder


class TurboMindLives:
    """Lives of one configuration of TurboMind; a context manager.

    Args:
        config: which.
        checkpoints: a folder in which stand-in checkpoints are kept.
    """

    def __init__(self, config: Config, checkpoints: Path) -> None:
        self._config = config
        self._spec = _spec(config, stand_in_checkpoint(config, checkpoints))
        self._shared = ""
        self._before = (0, 0)

    def __enter__(self) -> TurboMindLives:
        self._server = ForkServer().__enter__()
        self._rooms = tempfile.TemporaryDirectory(prefix="turbofit-allocations-")
        self._beside = ForkServer().__enter__() if self._config.beside else None
        if self._beside is not None:
            self._serve_beside(self._beside)
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside is not None:
            os.killpg(self._staying, signal.SIGKILL)
            self._beside.__exit__()
        self._server.__exit__()
        self._rooms.cleanup()

    def whole(self) -> list[Point]:
        """A life in which nothing fails: all its allocations, in their order."""
        life = self._server.run(self._spec, self._room("whole"), self._shared)
        if life.status != 0 or not life.report.get("done"):
            raise RuntimeError(f"the whole life did not serve: {life.log[-2000:]!r}")
        return list(_points(read_timeline(life.timeline), self._spec.machine))

    def fail(self, number: int, *, pinned: bool) -> Ended:
        """A life in which one allocation fails."""
        count = number + self._count()[pinned]
        changes: dict[str, Any] = {"fail_pinned_at" if pinned else "fail_at": count}
        spec = replace(self._spec, machine=replace(self._spec.machine, **changes))
        begun = time.monotonic()
        life = self._server.run(spec, self._room(f"{number}-{pinned:d}"), self._shared)
        seconds = time.monotonic() - begun
        events = read_timeline(life.timeline) if life.timeline.exists() else iter(())
        failed = _failed(events, spec.machine)
        log = life.log + str((life.report.get("error") or {}).get("traceback", "")).encode()
        if failed is None:
            return Ended("not met", None, seconds, log=log)
        if life.status is None:
            return Ended("hang", failed, seconds, log=log)
        if life.report.get("done"):
            cases = life.report["cases"]
            fine = all(case["finished"] and set(case["statuses"]) <= {"finished"} for case in cases)
            return Ended("recovered" if fine else _answer(cases), failed, seconds, log=log)
        return judged(self._config, failed, seconds, log)

    def _room(self, name: str) -> Path:
        folder = Path(self._rooms.name) / name
        folder.mkdir()
        return folder

    def _count(self) -> tuple[int, int]:
        """Allocations that the machine has seen before this life."""
        if not self._shared:
            return 0, 0
        from turbofit.pretend.shared import read_shared

        seen = read_shared(Path(self._shared))
        return seen.allocations, seen.pinned_allocations

    def _serve_beside(self, server: ForkServer) -> None:
        """Another engine that is up, and stays: its last case waits for ever."""
        self._shared = str(Path(self._rooms.name) / "shared")
        room = self._room("beside")
        settings = {**self._spec.settings, "cache_max_entry_count": 0.3}
        spec = replace(self._spec, settings=settings)
        self._staying = server.begin(spec, room, self._shared, stay=True)
        _until((room / "staying").exists, BOUND)


def judged(config: Config, point: Point, seconds: float, log: bytes) -> Ended:
    """A death, and whether turbofit's diagnosis is right."""
    found = _diagnosis(config, log)
    said = f"{found.kind} in {found.phase}: {found.what}"
    wrong = []
    if point.pinned and found.phase == "unknown" and "page-locked" in found.what:
        pass  # torch's own words do not tell which memory it was, and turbofit says so
    elif found.kind != ("host_out_of_memory" if point.pinned else "out_of_memory"):
        wrong.append(f"kind {found.kind}")
    elif found.phase not in _phases(config, point) and not _ahead(point, found, log):
        wrong.append(f"phase {found.phase}, in truth {' or '.join(_phases(config, point))}")
    texts = " ".join((found.what, *found.why, *found.changes))
    if not config.beside and any(word in texts for word in _BLAMES):
        wrong.append("blames somebody who is not there")
    kind = "misnamed" if wrong else "named"
    return Ended(kind, point, seconds, said, "; ".join(wrong), log)


_VISION = re.compile(r"Vit|Vision|vision|visual")
#: Words with which a diagnosis says for certain that somebody else has the memory.
_BLAMES = ("somebody else held", "other processes held", "held by somebody else", "end process")


def _phases(config: Config, point: Point) -> tuple[str, ...]:
    """What turbofit may call the phase of an allocation.

    A request of an engine on torch is one phase here: its timeline does not tell tower and text.
    """
    if point.pinned:
        return ("host RAM",)
    if point.phase.startswith(("case", "ready")):
        if config.engine != "turbomind":
            return "vision", "text"
        return ("vision",) if _VISION.search(point.site) else ("text",)
    if point.phase in ("buffers", "engine", "cache", "sizing", "graph runner"):
        return ("warm-up",) if point.executor else ("cache",)
    return ("warm-up",) if point.phase == "warm-up" else ("weights",)


def _ahead(point: Point, found: Diagnosis, log: bytes) -> bool:
    """Whether the engine computed ahead: a step of a warm-up that its log calls finished."""
    return point.phase == "warm-up" and found.phase == "text" and b"Warm-up finished" in log


def _answer(cases: list[dict[str, Any]]) -> str:
    return "hang" if any(not case["finished"] for case in cases) else "answered"


def _spec(config: Config, folder: Path) -> Spec:
    tp = len(config.gpus)
    qwen = "qwen" in config.model
    request = RehearsalRequest(units=((1, 60, 60),) if qwen else (13,), text_tokens=100)
    settings = {
        "tp": tp,
        "max_batch_size": 16,
        "max_prefill_token_num": 2048,
        "session_len": 8192,
        "cache_max_entry_count": 0.5,
        "communicator": "nccl",
    }
    return Spec(
        machine=Scenario(gpus=config.gpus),
        model_dir=folder,
        settings=settings,
        cases=(RehearsalCase("worst", (request,)),),
        case_seconds=BOUND / 4,
    )


@cache
def _symbols() -> Symbols:
    return Symbols(engine_library())


def _points(events: Iterable[Event], machine: Scenario) -> Iterable[Point]:
    """Every allocation of a timeline that was given or failed."""
    ledger = Ledger(len(machine.gpus), CallSites(_symbols().name), machine.pool_step)
    sites = CallSites(_symbols().name)
    counts = [0, 0]
    for event in events:
        ledger.read((event,))
        if event.tag not in "AE":
            continue
        pinned = event.number(1) == PINNED
        counts[pinned] += 1
        phase = ledger.cards[event.number(0)].phase
        pool = ledger.pools.get(event.number(2))
        executor = pool is not None and pool.owner == "executor"
        yield Point(counts[pinned], pinned, phase, sites.site(event.trace), executor)


def _failed(events: Iterable[Event], machine: Scenario) -> Point | None:
    seen = list(events)
    at = next((i for i, event in enumerate(seen) if event.tag == "E"), None)
    return None if at is None else list(_points(seen[: at + 1], machine))[-1]


def _until(holds: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise RuntimeError("the engine beside did not come up")
        time.sleep(0.1)
