"""Reads the documents of reports: a saved plan, a run's folder, or the newest document.

The state folder keeps the last plan, prediction and rehearsal, and every run.
"""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.messages import HOW_TO_SERVE, guess
from turbofit.core.plan import PLAN_SCHEMA, Plan, ServeCommand
from turbofit.core.process.files import StateFile, state_dir
from turbofit.core.run_report import RunReport
from turbofit.core.struct import Struct, const, decode
from turbofit.model.names import names_a_model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.plan import EnginePlan

_RUN_WITH_PLAN: Final = "turbofit.report/2"

LATEST: Final = "latest"
#: More bytes than any plan has: a limit for a device or a checkpoint that is read by mistake.
_LARGEST: Final = 64 << 20
_ROOM: Final = "plans"
_RUNS: Final = "runs"


class StoredPlan(NamedTuple):
    """A plan, the run that launched the plan, and the path of both."""

    plan: Plan
    run: RunReport | None
    where: str


class _Cause(Struct):
    message: str
    hint: str = ""


class _Head(Struct):
    """The fields by which a document is known before it is read whole.

    ``error`` is there if a failed command wrote the document; ``serve`` has the options of a plan.
    """

    schema: str = ""
    error: _Cause | None = None
    serve: ServeCommand | None = None


class RunDocument(Struct):
    """The document of ``report RUN --json``."""

    schema: Annotated[str, const(_RUN_WITH_PLAN)] = _RUN_WITH_PLAN
    plan: Plan
    run: RunReport


def keep(plan: Plan, command: str) -> None:
    """Store a plan as the newest of its command, if the state folder can be written."""
    StateFile(_ROOM, command, Plan).write(plan)


def saved_document(saved: StoredPlan) -> Plan | RunDocument:
    """Return the document that `--json` prints for a stored plan."""
    return saved.plan if saved.run is None else RunDocument(plan=saved.plan, run=saved.run)


def read_saved(path: str) -> StoredPlan:
    """Read the plan of a file, ``-`` (stdin), a run's folder, a run's name, or ``latest``.

    Raises:
        UsageError: the path has no plan, or an unreadable plan.
    """
    if path == LATEST:
        stored = reportable()
        if not stored:
            raise UsageError(
                "nothing was planned, rehearsed or served yet",
                hint="turbofit plan MODEL, then turbofit report latest",
            )
        path = stored[0]
    folder = _run_folder(path)
    if folder:
        return _read_run(folder)
    # Read once, since stdin and a shell's <(turbofit plan …) cannot be read a second time.
    data = _bytes(path)
    if _head(data).schema == _RUN_WITH_PLAN:
        both = decode(data, RunDocument, what=f"report {path}")
        check_consistent(both.plan, f"report {path}")
        return StoredPlan(both.plan, both.run, path)
    return StoredPlan(_plan(data, path), None, path)


def read_plan(path: str) -> Plan:
    """Read a plan from a file, or from stdin if the path is ``-``."""
    return _plan(_bytes(path), path)


def _plan(data: bytes, path: str) -> Plan:
    """Read a plan; refuse an older schema and the error of a failed command."""
    head = _head(data)
    if head.schema not in ("", PLAN_SCHEMA):
        again = "turbofit plan MODEL"
        if head.serve is not None:
            again = shlex.join(("turbofit", "plan", *head.serve.argv[2:]))
        raise UsageError(
            f"{path} cannot be read as a plan: its schema is {head.schema!r}, not {PLAN_SCHEMA!r}",
            hint=f"{again} --json makes a plan of this version",
        )
    failed = head.error
    if failed is not None and not head.schema:
        raise UsageError(f"{path} holds an error, no plan: {failed.message}", hint=failed.hint)
    plan = Plan.from_json(data, what=f"plan {path}")
    check_consistent(plan, f"plan {path}")
    return plan


def _head(data: bytes) -> _Head:
    """Return the schema and the error of a document; empty for text that is no JSON."""
    try:
        return msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Head()


def _bytes(path: str) -> bytes:
    try:
        if path == "-":
            return sys.stdin.buffer.read(_LARGEST)
        with open(path, "rb") as file:
            return file.read(_LARGEST)
    except OSError as exc:
        model = shlex.quote(path) if names_a_model(path) else "MODEL"
        raise UsageError(
            f"{path or repr(path)} cannot be read: {exc.strerror or exc}",
            hint=guess(path, (LATEST,))
            or f"write a plan with turbofit plan {model} --json > plan.json",
        ) from None


def _run_folder(path: str) -> Path | None:
    """Return the folder of a run, by its path, its record's path or its name, else None."""
    given = Path(path)
    places = [given, given.parent] if given.name == "run.json" else [given]
    if given.name == path and not os.path.exists(given):
        places.append(state_dir(_RUNS, make=False) / path)
    # `Path.is_file` raises for an unreadable folder and for too long a name; os.path does not.
    return next((place for place in places if os.path.isfile(place / "run.json")), None)


def _read_run(folder: Path) -> StoredPlan:
    """Read a run with the plan of its last start.

    If that plan is missing, read the plan of the first start, and add a warning.
    """
    path = folder / "run.json"
    run = decode(_bytes(str(path)), RunReport, what=f"run {path}")
    number = run.attempts[-1].number if run.attempts else 0
    first, last = folder / "plan.json", folder / f"plan-{number}.json"
    if number and not last.is_file():
        plan = read_plan(str(first))
        warning = f"{last.name}, the plan of the last start, is missing: this is the first plan"
        plan = msgspec.structs.replace(plan, warnings=(*plan.warnings, warning))
    else:
        plan = read_plan(str(last if number else first))
    return StoredPlan(plan, run, str(folder))


def read_run(run: str | None) -> StoredPlan:
    """Read a run by its folder, its name or its model; None is this user's newest run.

    Raises:
        UsageError: no run has this name, or the name is the path of a plan.
    """
    from turbofit.serving.runs import newest_run_of

    if run is None:
        runs = _newest_first(state_dir(_RUNS, make=False).glob("*/run.json"))
        if not runs:
            raise UsageError("nothing was served yet", hint=HOW_TO_SERVE)
        return read_saved(runs[0])
    newest = newest_run_of(run)
    if not (newest or run in (LATEST, "-") or _run_folder(run) or os.path.exists(run)):
        raise UsageError(f"no run is called {run!r}", hint="turbofit report lists runs")
    saved = read_saved(str(newest or run))
    if saved.run is None:
        raise UsageError(f"{run} is a plan, not a run", hint="turbofit report lists runs")
    return saved


def reportable() -> list[str]:
    """Return the paths of this user's stored plans and runs, the newest first."""
    plans, runs = (state_dir(folder, make=False) for folder in (_ROOM, _RUNS))
    return _newest_first([*plans.glob("*.json"), *runs.glob("*/run.json")])


def summary(path: str) -> tuple[str, str, str]:
    """Return the path, the subject and the time of a stored document."""
    try:
        plan = read_saved(path).plan
    except UsageError as exc:
        return path, exc.message, ""
    return path, f"{plan.model.name} on {plan.machine.name}", plan.created


def _newest_first(paths: Iterable[Path]) -> list[str]:
    times = []
    for path in paths:
        with suppress(OSError):
            times.append((path.stat().st_mtime_ns, str(path)))
    return [path for _, path in sorted(times, reverse=True)]


def check_consistent(plan: Plan, what: str) -> None:
    """Refuse a plan whose parts contradict each other; ``what`` is its name in the message.

    Raises:
        UsageError: the GPUs, groups and rehearsals of the plan do not agree.
    """
    used = [index for engine in plan.engines for index in engine.gpus]
    consistent = (
        len(used) == len(set(used)),
        set(used) <= {gpu.index for gpu in plan.machine.gpus},
        all(map(_is_consistent, plan.engines)),
    )
    if not all(consistent):
        raise UsageError(
            f"{what} cannot be read: its GPUs, groups and rehearsal contradict each other",
            hint="was it edited by hand? plan again, and change settings by options instead",
        )


def _is_consistent(engine: EnginePlan) -> bool:
    """Return whether an engine's GPUs, ledgers and rehearsal agree."""
    if tuple(ledger.index for ledger in engine.ledgers) != engine.gpus:
        return False
    rehearsal = engine.rehearsal
    if rehearsal is None:
        return True
    cells = (cells for moment in rehearsal.timeline for cells in (moment.peak, moment.end))
    return {len(engine.gpus)} >= {
        len(values) for values in (*cells, rehearsal.cache.free, rehearsal.cache.region)
    }
