"""Runs any command on a pretend machine, and reports how much memory its processes used."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from turbofit.core.engine_end import signal_name
from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Machine
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.processes import output_of
from turbofit.core.struct import Document
from turbofit.core.units import MIB
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.command import (
    cuda_site,
    pretend_environment,
    run_command,
    site_with,
)
from turbofit.rehearsal.pretend.process_memory import ProcessMemory
from turbofit.rehearsal.pretend.record import MachineRecord, read
from turbofit.rehearsal.pretend.scenario import Scenario, pretend_twin, write_scenario
from turbofit.rehearsal.pretend.usage import BEFORE, Process

_LOG: Final = LazyLogger(__name__)

NOTICE: Final = "PRETEND GPUs: values and speed are not real"
_TIMELINE_LIMIT: Final = 64 * MIB
_PYTHON: Final = re.compile(r"(python|pypy)[\d.]*$")
_ASK: Final = "from importlib.util import find_spec as f; print((f('torch') or f('os')).origin)"
SCHEMA = "turbofit.pretend-run/1"


@dataclass(frozen=True)
class FinishedRun:
    """A command that ran for ``seconds`` of wall time; ``code`` is negative after a signal."""

    command: tuple[str, ...]
    code: int
    seconds: float
    machine: MachineRecord

    @property
    def exit_code(self) -> int:
        """The exit code as in a shell: 128 plus the signal's number after a signal."""
        return 128 - self.code if self.code < 0 else self.code


def scenario_of(machine: Machine, context: Callable[[Gpu], int]) -> Scenario:
    """Return a pretend machine with the cards of ``machine``.

    Each process pays for its CUDA context on each card. ``context`` returns the bytes of a context
    on a card; the largest of these sizes is used for all cards.
    """
    indices = machine.visible or tuple(gpu.index for gpu in machine.gpus)
    largest = max((context(machine.gpu(index)) for index in indices), default=0)
    return replace(pretend_twin(machine, indices), context=largest, timeline_limit=_TIMELINE_LIMIT)


def run_pretend(  # noqa: PLR0913 - each keyword is a choice of the caller
    command: Sequence[str],
    scenario: Scenario,
    *,
    keep: Path | None = None,
    stdout: int | IO[bytes] | None = None,
    every: float = 3600.0,
    tick: Callable[[], None] = lambda: None,
    base: Mapping[str, str] | None = None,
    python: str | None = None,
    library: Path | None = None,
) -> FinishedRun:
    """Run a command on a pretend machine until it and all processes that it started have ended.

    ``keep`` is a new or empty folder for scenario, shared file and timelines. ``tick`` is called
    every ``every`` seconds. The pretend machine adds variables to the environment ``base``, which
    is this process's if None. The command loads the packages of ``python``; see `site_of`.
    ``library`` is the engine's library whose calls the record names.

    Raises:
        UsageError: the command cannot be run, or the folder cannot be used.
        PretendError: the pretend libraries cannot be built.
    """
    site = site_of(command, python)
    with tempfile.TemporaryDirectory(prefix="turbofit-pretend-") as temporary:
        folder = _kept(keep) if keep else Path(temporary)
        env = prepare(scenario, folder, base, site=site)

        _LOG.info("on pretend GPUs: %s in %s", command[0], folder)
        begun = time.monotonic()
        code = run_command(command, env, stdout=stdout, every=every, tick=tick)
        seconds = round(time.monotonic() - begun, 3)
        _LOG.info("on pretend GPUs: %s ended with code %d after %s s", command[0], code, seconds)
        return FinishedRun(tuple(command), code, seconds, read(folder, scenario, library))


def prepare(
    scenario: Scenario,
    folder: Path,
    base: Mapping[str, str] | None = None,
    *,
    site: Path | None = None,
) -> dict[str, str]:
    """Write a pretend machine's files to a new or empty folder; return its processes' environment.

    ``site`` is the ``site-packages`` folder of the programs that will run.
    """
    libraries = build(site=site)
    path, timelines = folder / "scenario", folder / "timelines"
    timelines.mkdir(parents=True)
    write_scenario(path, scenario, f"{timelines}/", str(folder / "shared"))
    return pretend_environment(libraries, path, base, site=site)


def _kept(folder: Path) -> Path:
    """Make the folder of ``--keep``, or take it if it is empty; return its whole path.

    Raises:
        UsageError: the folder cannot be made or read, or it is not empty.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as exc:
        raise UsageError(
            f"{folder} cannot be used: {exc.strerror or exc}", hint="name a folder for --keep"
        ) from None
    if used:
        raise UsageError(f"{folder} is not empty", hint="name a new folder for --keep")
    return folder.resolve()


def site_of(command: Sequence[str], python: str | None = None) -> Path | None:
    """Return the ``site-packages`` folder with the CUDA build of torch that a command will load.

    The Python of this folder is ``python``; else the command, if the command is a Python; else the
    Python of this process. The result is None if its torch is no CUDA build.

    Raises:
        UsageError: there is no Python at this path.
    """
    if python is not None and shutil.which(python) is None:
        raise UsageError(f"no Python at {python}", hint="--python takes a Python's path or name")
    if python is None and not _PYTHON.match(Path(command[0]).name):
        return cuda_site()
    python = python or command[0]
    answer = output_of([python, "-c", _ASK], 30.0)
    return cuda_site() if answer is None else site_with(answer.decode().strip() or "/nonexistent")


def report(ran: FinishedRun) -> Document:
    """Return the document of a run, without processes that held no memory."""
    machine = ran.machine
    cards = range(len(machine.scenario.gpus))
    rows = [_process_row(one, used, len(cards)) for one, used in machine.pairs() if one.used]
    return {
        "schema": SCHEMA,
        "pretend": NOTICE,
        "command": list(ran.command),
        "exit_code": ran.exit_code,
        "signal": signal_name(-ran.code) if ran.code < 0 else None,
        "seconds": ran.seconds,
        "context": machine.scenario.context,
        "gpus": [{"gpu": index, **machine.card_at_peak(index)} for index in cards],
        "processes": rows,
        "pinned_peak": machine.shared.pinned_peak,
        "allocations": machine.shared.allocations,
        "pinned_allocations": machine.shared.pinned_allocations,
        "refused": machine.newest_refusal(),
    }


def _process_row(process: Process, memory: ProcessMemory, gpus: int) -> dict[str, Any]:
    """Return the document of one process, with a row for each card that it used."""
    rows = []
    for index in range(gpus):
        if not (process.peak[index] or process.context[index]):
            continue
        phases = memory.cards[index].peak
        rows.append(
            {
                "gpu": index,
                "context": process.context[index],
                "peak": process.peak[index],
                "phase": max(phases, key=phases.__getitem__, default=BEFORE),
                "held_at_end": process.allocated[index],
                "at_combined_peak": process.at_peak[index],
                "phases": phases,
            }
        )
    return {
        "pid": process.pid,
        "parent": memory.parent,
        "command": memory.command,
        "gpus": rows,
        "pinned_peak": process.pinned_peak,
        "refused": len(memory.deaths),
        "complete": memory.complete,
    }
