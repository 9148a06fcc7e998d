"""Makes the document of `turbofit report --share`: a run on real cards, without private facts."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.installation import installed
from turbofit.core.machine import Host, Machine
from turbofit.core.model import Model
from turbofit.core.plan import EnginePlan, GpuLedger, Plan
from turbofit.core.run_report import RunAttempt, RunReport
from turbofit.core.struct import Document, Struct, const, decode, doc
from turbofit.core.units import format_bytes, mib
from turbofit.report.painters.document import Block, FactList, Heading, Items, Paragraph, table
from turbofit.report.stored_documents import StoredPlan
from turbofit.serving.calibration import SEEN_FILE, Observation, phase_rows

SHARE_SCHEMA: Final = "turbofit.share/2"
LEFT_OUT: Final = (
    "UUIDs of the GPUs, other processes, the host's name, memory and processors",
    "paths, addresses, command lines, options, and names of models that are folders",
    "logs, messages and events",
    "the time of day",
)
_TITLES: Final = ("GPU", "what", "forecast", "measured")
_PACKAGES: Final = ("torch", "transformers", "triton")
#: Lists of a plan that are left out, since they are useful only to the owner of the plan.
_EMPTIED: Final = (
    "considered", "reasons", "warnings", "remedies", "limit_costs"
)  # fmt: skip
#: The fields of a run's end that contain only turbofit's own words.
_ENDING: Final = ("kind", "phase", "exit_code", "asked", "left", "missing")


class SharedRun(Struct):
    """A run on real cards and its forecast."""

    schema: Annotated[str, const(SHARE_SCHEMA)] = SHARE_SCHEMA
    plan: Annotated[Plan, doc("The launched plan: cards, settings, the ledger of each GPU.")]
    run: Annotated[RunReport, doc("Each start: seconds, figures, memory in use at each phase.")]
    packages: Annotated[dict[str, str], doc("The versions of Python and of its packages.")]
    seen: Annotated[
        tuple[Observation, ...], doc("Readings of `calibrate` from the GPUs; empty after `serve`.")
    ] = ()

    @property
    def phases(self) -> list[Document]:
        return phase_rows(self.plan, self.seen)


def shared(saved: StoredPlan) -> SharedRun:
    """Return the document of a run on real cards.

    Raises:
        UsageError: the run was on pretend GPUs.
    """
    assert saved.run is not None
    plan, run = saved.plan, saved.run
    if run.pretend or plan.machine.source != "nvml":
        raise UsageError(
            f"{saved.where} ran on pretend GPUs: it has no figure of a real card",
            hint="turbofit calibrate MODEL on real GPUs, then turbofit report --share",
        )
    observations: tuple[Observation, ...] = ()
    with suppress(FileNotFoundError):
        data = Path(saved.where, SEEN_FILE).read_bytes()
        observations = decode(data, tuple[Observation, ...], what=SEEN_FILE)
    versions = {name: installed(name) for name in _PACKAGES}
    packages = {name: version for name, version in versions.items() if version is not None}
    model = _model(plan.model)
    return SharedRun(
        plan=_plan(plan, model),
        run=_run(run, model.name),
        packages={"python": platform.python_version(), **packages},
        seen=observations,
    )


def _model(model: Model) -> Model:
    """Return a model without its path; a model in a folder gets the name of its architecture."""
    folder = model.source.kind == "folder"
    return replace(
        model,
        name=model.architecture if folder else model.name,
        hub_id=None if folder else model.hub_id,
        source=replace(model.source, where="", checkpoint=None),
        warnings=(),
    )


def _plan(plan: Plan, model: Model) -> Plan:
    """Return a plan that others may read: without private facts, of a ``model`` without them."""
    emptied: dict[str, Any] = dict.fromkeys(_EMPTIED, ())
    return replace(
        plan,
        created=_day(plan.created),
        verdict="",
        model=model,
        machine=_machine(plan.machine),
        engines=tuple(map(_engine, plan.engines)),
        host=replace(plan.host, available=None),
        serve=None,
        options=UNSET,
        **emptied,
    )


def _engine(engine: EnginePlan) -> EnginePlan:
    return replace(
        engine, ledgers=tuple(map(_ledger, engine.ledgers)), command=None, rehearsal=None
    )


def _machine(machine: Machine) -> Machine:
    return replace(
        machine,
        name=" + ".join(gpu.name for gpu in machine.gpus),
        source=machine.source.split(" ")[0],
        gpus=tuple(replace(gpu, uuid=f"GPU-{gpu.index}", holders=()) for gpu in machine.gpus),
        host=Host(),
        warnings=(),
        calibrations=(),
    )


def _ledger(gpu: GpuLedger) -> GpuLedger:
    terms = tuple(replace(term, note="") for term in gpu.terms)
    return replace(gpu, uuid=f"GPU-{gpu.index}", terms=terms)


def _run(run: RunReport, model: str) -> RunReport:
    """Return a run that others may read: days in place of times, no events, no messages."""
    attempts = tuple(
        RunAttempt(
            started=_day(attempt.started),
            number=attempt.number,
            changes=attempt.changes,
            engines=attempt.engines,
            moments=attempt.moments,
            ended=_ended(attempt.ended),
            restarts=attempt.restarts,
            memory_back=attempt.memory_back,
        )
        for attempt in run.attempts
    )
    return RunReport(
        turbofit_version=run.turbofit_version,
        started=_day(run.started),
        state=run.state,
        model=model,
        pretend=run.pretend,
        lmdeploy=run.lmdeploy,
        ended=_ended(run.ended) if isinstance(run.ended, dict) else run.ended,
        attempts=attempts,
    )


def _ended(ended: Document | None) -> Document | None:
    return None if ended is None else {key: ended[key] for key in _ENDING if key in ended}


def _day(when: str) -> str:
    return when.split("T", maxsplit=1)[0]


def share_view(document: SharedRun) -> list[Block]:
    """Return the blocks on a shared run: its versions and figures, and what was left out."""
    plan, run = document.plan, document.run
    machine = plan.machine
    versions = {"turbofit": run.turbofit_version, "LMDeploy": run.lmdeploy, **document.packages}
    end = run.ended.get("kind", "") if isinstance(run.ended, dict) else run.ended
    facts = (
        ("cards", machine.name),
        ("driver", f"{machine.driver}, CUDA {machine.cuda}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("engine", f"{plan.backend.name}, {len(plan.groups)} of tp {plan.tp}"),
        ("starts", f"{len(run.attempts)}, {run.state}{f' ({end})' if end else ''}"),
    )
    return [
        Heading(f"{plan.model.name} on {machine.name}, as others may read it"),
        FactList(facts),
        table(_TITLES, _rows(document), right=_TITLES[2:], wrap=_TITLES[1:2]),
        Paragraph("Left out:"),
        Items(LEFT_OUT),
        Paragraph("--json shows every byte of it. Nothing is sent."),
    ]


def _rows(document: SharedRun) -> Iterator[tuple[str, ...]]:
    """Yield forecast and measurement of each phase of a calibration and each figure of a run."""
    for row in document.phases:
        what = f"in use, MiB: {row['phase']}"
        yield str(row["gpu"]), what, mib(row["forecast"]), mib(row["measured"])
    for group, figure in document.run.rows:
        where = f"engine {group}" if figure.gpu is None else str(figure.gpu)
        if figure.unit == "tokens":
            yield where, figure.what, f"{figure.forecast:,}", f"{figure.actual:,}"
        else:
            yield where, figure.what, format_bytes(figure.forecast), format_bytes(figure.actual)
