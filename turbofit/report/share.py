"""Makes the document of `turbofit report --share`: a run on real cards, without private facts."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.forecast import Surety, Throughput, UsualImage
from turbofit.core.images import ImageRule
from turbofit.core.images.video import VideoRule
from turbofit.core.installation import installed
from turbofit.core.machine import (
    CardSpeed,
    Gpu,
    Link,
    Machine,
    Measured,
    MeasuredRate,
    MeasuredSteps,
    PairSpeed,
    Pcie,
    ReduceSpeed,
    StepPoint,
)
from turbofit.core.model import (
    Adapter,
    AudioDims,
    DeltaDims,
    Draft,
    MlaDims,
    Model,
    ModelSource,
    MoeDims,
    Quantization,
    TextDims,
    VisionDims,
)
from turbofit.core.plan import (
    Backend,
    EnginePlan,
    Footprint,
    GpuLedger,
    HostMemory,
    Kv,
    Plan,
    Settings,
    Term,
    Workload,
)
from turbofit.core.promise import Limits, Promise
from turbofit.core.run_report import EngineRecord, RunAttempt, RunFigure, RunMoment, RunReport
from turbofit.core.struct import NA, Document, Struct, const, decode, doc
from turbofit.core.units import format_bytes, mib
from turbofit.planning.plan_document import on_machine
from turbofit.report.painters.document import Block, FactList, Heading, Items, Paragraph, table
from turbofit.report.stored_documents import StoredPlan
from turbofit.serving.calibration import SEEN_FILE, CalibratedGpu, Observation, phase_rows

SHARE_SCHEMA: Final = "turbofit.share/2"
LEFT_OUT: Final = (
    "UUIDs of the GPUs, other processes, the host's name, memory and processors",
    "paths, addresses, command lines, options, names of adapters, and of models that are folders",
    "logs, messages and events",
    "the time of day",
)
_TITLES: Final = ("GPU", "what", "forecast", "measured")
_PACKAGES: Final = ("torch", "transformers", "triton")
#: The types whose figures (numbers, yes or no) are kept, and the names of fields whose texts are
#: kept. All other texts become empty, and objects of other types are left out, so that a new field
#: tells nothing before it stands here. The keys of a dict count as texts.
_KEPT: Final[dict[type[Struct], str]] = {
    Plan: "turbofit_version",
    Model: "name architecture dtype hub_id tensor_bytes",
    TextDims: "architecture",
    **dict.fromkeys((MoeDims, DeltaDims, MlaDims, AudioDims, ImageRule, VideoRule), ""),
    VisionDims: "kind norm",
    Quantization: "method",
    ModelSource: "kind sizes",
    Adapter: "modules",
    Draft: "algorithm",
    Machine: "name source driver cuda",
    Gpu: "name",
    Link: "ancestor",
    Measured: "torch",
    MeasuredSteps: "weights",
    MeasuredRate: "of",
    **dict.fromkeys((Pcie, CardSpeed, PairSpeed, ReduceSpeed, StepPoint), ""),
    Workload: "goal",
    Backend: "name version communicator",
    Limits: "vision_unit",
    EnginePlan: "backend",
    Settings: "dtype communicator model_format distributed_executor_backend speculative_algorithm",
    GpuLedger: "name",
    Term: "term phase basis",
    Surety: "kind word",
    **dict.fromkeys((Promise, Kv, HostMemory, Throughput, UsualImage, Footprint), ""),
    RunReport: "turbofit_version state model lmdeploy",
    RunAttempt: "changes",
    EngineRecord: "seconds",
    RunFigure: "what unit",
    RunMoment: "phase used",
    Observation: "",
    CalibratedGpu: "used",
}
#: The fields of a run's end that contain only turbofit's own words.
_ENDING: Final = ("kind", "phase", "exit_code", "asked", "left", "missing")
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d(?=T)")


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
    model = _public(plan.model.name, plan.model) or plan.model.architecture
    return SharedRun(
        plan=_plan(plan, model),
        run=_run(run, model),
        packages={"python": platform.python_version(), **packages},
        seen=_kept(observations),
    )


def _kept(value: Any, *, named: bool = False) -> Any:
    """Return a value with what `_KEPT` keeps of it, UNSET if that is nothing.

    ``named``: the value is of a field whose texts are kept.
    """
    if isinstance(value, Struct):
        return _kept_fields(value)
    if isinstance(value, tuple):
        items = (_kept(item, named=named) for item in value)
        return tuple(item for item in items if item is not UNSET)
    if isinstance(value, dict):
        figures = {key: item for key, item in value.items() if isinstance(item, int | float)}
        return figures if named else UNSET
    if isinstance(value, str):
        return value if named or value == NA else UNSET
    return value


def _kept_fields(value: Struct) -> Struct | UnsetType:
    """Return a struct with its kept fields; all other fields have their default, or are empty."""
    texts = next((texts for kind, texts in _KEPT.items() if isinstance(value, kind)), None)
    if texts is None:
        return UNSET
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(value):
        given = getattr(value, field.name)
        kept = _kept(given, named=field.name in texts.split())
        if kept is not UNSET:
            fields[field.name] = kept
        elif field.required:
            fields[field.name] = type(given)()
    return type(value)(**fields)


def _plan(plan: Plan, model: str) -> Plan:
    """Return what others may read of a plan; ``model`` is the name that stands for its model."""
    kept: Plan = _kept(plan)
    machine = replace(
        kept.machine,
        name=" + ".join(gpu.name for gpu in plan.machine.gpus),
        gpus=tuple(replace(gpu, uuid=f"GPU-{gpu.index}") for gpu in kept.machine.gpus),
    )
    return replace(
        on_machine(kept, machine),
        created=_day(plan.created),
        model=replace(kept.model, name=model, hub_id=_public(plan.model.hub_id, plan.model)),
        host=replace(kept.host, available=None, image_threads=None),
    )


def _public(name: str | None, model: Model) -> str | None:
    """Return a model's name, None for a model in a folder, whose names are its owner's."""
    return None if model.source.kind == "folder" else name


def _run(run: RunReport, model: str) -> RunReport:
    """Return what others may read of a run: days in place of times, no events, no messages."""
    kept: RunReport = _kept(run)
    pairs = zip(kept.attempts, run.attempts, strict=True)
    return replace(
        kept,
        started=_day(run.started),
        model=model,
        ended=_ended(run.ended),
        attempts=tuple(
            replace(attempt, started=_day(given.started), ended=_ended(given.ended))
            for attempt, given in pairs
        ),
    )


def _ended(ended: object) -> Document | None:
    """Return the words and figures of an end; None for a run that a signal ended, or that runs."""
    if not isinstance(ended, dict):
        return None
    return {key: ended[key] for key in _ENDING if key in ended}


def _day(when: str) -> str:
    day = _DAY.match(when)
    return day[0] if day else ""


def share_view(document: SharedRun) -> list[Block]:
    """Return the blocks on a shared run: its versions and figures, and what was left out."""
    plan, run = document.plan, document.run
    machine = plan.machine
    versions = {"turbofit": run.turbofit_version, "LMDeploy": run.lmdeploy, **document.packages}
    end = run.ended.get("kind", "") if isinstance(run.ended, dict) else ""
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
