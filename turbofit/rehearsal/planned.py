"""Makes a rehearsal's specification from a plan, and puts its results into the plan's ledger.

Only plain documents cross between this process and the child that drives the engine. A `Spec` goes
as JSON; notes, records, timelines and a log come back as files. So the child knows no plan, this
process imports neither torch nor an engine, and what a dead child has left can be read. `Plan`,
`Rehearsal` and `AnyEnd` stay on this side: `plan_spec` makes a `Spec` of a plan, and a document of
`report` becomes a `Rehearsal`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import convert
from msgspec.structs import replace

from turbofit.core.engine_end import AnyEnd, Moment, Rehearsal, RehearsedTogether, exit_words
from turbofit.core.plan import EnginePlan, GpuLedger, Plan, Term
from turbofit.core.struct import Document, to_builtins
from turbofit.core.version import __version__
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.engines import engine_of
from turbofit.model.adapter_folders import with_copies
from turbofit.rehearsal.cases import limited
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.engines import REHEARSED_ENGINES
from turbofit.rehearsal.notes import DEAD, NOT_FINISHED
from turbofit.rehearsal.packages import DRAFT, needs
from turbofit.rehearsal.pretend.run import NOTICE
from turbofit.rehearsal.pretend.scenario import PretendGpu, Scenario, pretend_twin
from turbofit.rehearsal.run import KEPT, EndedRun, Readings, run_child
from turbofit.rehearsal.spec import SPECULATIVE_CONFIG, Spec

SCHEMA: Final = "turbofit.rehearsal/1"
#: A phase whose name begins with these words has a worst case with images.
_IMAGES: Final = "case vision"
#: The phase that begins when an engine reads free memory.
_SIZED: Final = "cache"
_KEPT_LINES: Final = 12
#: The fewest tokens that a worst case generates.
_NEW = 2
#: Terms that one call of the engine allocates together, and the name of their common counter.
_TOGETHER = {"attention_workspace": "attention", "block_pointers": "attention"}


def rehearse(spec: Spec, keep: Path | None = None) -> Document:
    """Run a rehearsal and return its document.

    ``keep`` is a folder that gets the timelines, notes and log.

    Raises:
        PackageError: the engine, a package that it runs, or a C compiler is missing.
    """
    rehearsed, versions = REHEARSED_ENGINES[spec.engine], needs(spec)
    has_draft = spec.settings.get(SPECULATIVE_CONFIG)
    path = (*rehearsed.path, DRAFT) if has_draft else rehearsed.path
    folder = Path(tempfile.mkdtemp(prefix="turbofit-rehearsal-"))
    try:
        library = None if rehearsed.library is None else rehearsed.library()
        ended = run_child(spec, folder, rehearsed.environ, path, library)
        document = report(ended, rehearsed.read(ended), versions)
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
            document["files"] = str(keep)
        return document
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(ended: EndedRun, readings: Readings, versions: Mapping[str, str]) -> Document:
    """Return the document of an ended rehearsal, with the versions of the engine's packages."""
    outcome, end = outcome_and_end(ended, readings)
    notes, spec = ended.notes, ended.spec
    facts: Document = {
        "schema": SCHEMA,
        "turbofit_version": __version__,
        "pretend": NOTICE,
        "engine": spec.engine,
        "outcome": outcome,
        "death": None if end is None else to_builtins(end),
        "ended": exit_words(ended.ran.code),
        "seconds": ended.ran.seconds,
        "child_seconds": notes.get("seconds", {}),
        "versions": dict(versions),
        "environment": {name: os.environ[name] for name in KEPT if name in os.environ},
        "settings": notes.get("settings") or dict(spec.settings),
    }
    cards = zip(readings.cards, readings.phases, strict=True)
    timeline = moments(readings.phases, spec.machine.gpus)
    return {
        **facts,
        "cache": readings.cache,
        "terms": readings.terms,
        "gpus": [card | {"phases": phases} for card, phases in cards],
        "cases": [_case(case, readings) for case in notes.get("cases", [])],
        "timeline": [to_builtins(moment) for moment in timeline],
        "pinned": dict(readings.pinned),
        "not_known": list(REHEARSED_ENGINES[spec.engine].not_known),
        "error": notes.get("error"),
        "log": ended.log[-_KEPT_LINES:],
    }


def _case(case: Mapping[str, Any], readings: Readings) -> dict[str, Any]:
    """Return a case with the most bytes in use on each card, and with the engine's counters."""
    phase = f"case {case['name']}"
    return {
        **case,
        "peak": [phases.get(phase, {}).get("peak", 0) for phases in readings.phases],
        "transient": [terms.get(case["name"], 0) for terms in readings.terms],
        "pinned": readings.pinned.get(phase, 0),
    }


def outcome_and_end(ended: EndedRun, readings: Readings) -> tuple[str, AnyEnd | None]:
    """Return a rehearsal's outcome, and how the engine ended; None if the outcome is ``served``.

    The outcome is ``served``, ``out_of_memory``, ``hang`` or ``failed``. ``served`` means that the
    engine answered or refused every request, and lives.
    """
    cases = ended.notes.get("cases", [])
    unfinished = next((case["name"] for case in cases if NOT_FINISHED in case["statuses"]), None)
    dead = any(case["statuses"].keys() & DEAD for case in cases)
    served = ended.notes.get("done") and ended.ran.code == 0
    if served and unfinished is None and not dead and not ended.stopped:
        return "served", None
    end = convert(readings.end, AnyEnd)
    if end.kind == "out_of_memory":
        return "out_of_memory", end
    if ended.stopped == "idle":
        end = replace(end, kind="hang", where="nothing happened any more")
    elif unfinished is not None:
        phase, where = f"case {unfinished}", "not finished in time"
        end = replace(end, kind="hang", phase=phase, where=where)
    return "hang" if end.kind == "hang" else "failed", end


def moments(phases: Sequence[Document], gpus: Sequence[PretendGpu]) -> tuple[Moment, ...]:
    """Return the phases in order, with the bytes in use on each card at the peak and at the end.

    For each card ``phases`` has the bytes ``peak`` and ``held`` (at the end) by phase. The result
    also includes the bytes that were charged to the card.
    """
    order, lanes = max(phases, key=len, default={}), []  # a card may lack phases of another card
    for spans, gpu in zip(phases, gpus, strict=True):
        base, in_use, lane = gpu.used, 0, []
        for phase in order:
            base += gpu.late if phase == _SIZED else 0
            span = spans.get(phase, {"peak": in_use, "held": in_use})
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


def rehearsed_engine(plan: Plan, group: int = 0, keep: Path | None = None) -> EnginePlan:
    """Rehearse the worst cases of one engine of a plan; return the engine with the bytes seen."""
    engine = plan.engines[group]
    document = plan_document(plan, group, keep)
    versions = document["versions"]
    version = versions.get("lmdeploy") or versions.get(plan.backend.name, "")
    rehearsal = convert(document | {"engine_version": version}, Rehearsal)
    if rehearsal.outcome != "served":
        return replace(engine, rehearsal=rehearsal)
    refused = broken_promise(plan, engine, document)
    if refused is not None:
        return replace(engine, rehearsal=replace(rehearsal, outcome="failed", death=refused))
    rehearsal = replace(rehearsal, together=_together(engine, document))
    return replace(engine, ledgers=with_rehearsed_terms(engine, document), rehearsal=rehearsal)


def plan_document(plan: Plan, group: int = 0, keep: Path | None = None) -> Document:
    """Rehearse the worst cases of a plan on one of its groups; return the document.

    Raises:
        PackageError: LMDeploy, a C compiler or another package is missing.
        UsageError: the model's own checkpoint is needed, and it is not on disk.
    """
    with tempfile.TemporaryDirectory(prefix="turbofit-rehearsal-") as scratch:
        # LMDeploy chooses the chat template by the folder's name, so this is the model's name.
        folder = Path(scratch) / plan.model.name
        folder = checkpoint_for(limited(plan), folder, torch=plan.backend.on_torch)
        return rehearse(
            plan_spec(with_copies(plan, Path(scratch) / "adapters"), folder, group), keep
        )


def plan_spec(plan: Plan, checkpoint: Path, group: int = 0) -> Spec:
    """Return the specification of a rehearsal of one group of a plan, on a checkpoint."""
    engine = plan.engines[group]
    settings: dict[str, object] = dict(engine.lmdeploy_settings())
    settings[SPECULATIVE_CONFIG] = engine.speculative_config() or None
    if not plan.backend.of_lmdeploy:
        settings = {"dtype": engine.settings.dtype, "device_map": engine.device_map}
    return Spec(
        machine=charged(plan, group),
        model_dir=str(checkpoint.absolute()),
        engine=plan.backend.name,
        settings={name: value for name, value in settings.items() if value is not None},
        cases=REHEARSED_ENGINES[plan.backend.name].worst(plan, engine),
        environ=engine_of(plan).environment(plan.model, engine.settings, engine.ledgers),
    )


def charged(plan: Plan, group: int = 0) -> Scenario:
    """Return the pretend machine of one group; terms that only a real card has are in use on it."""
    rehearsed, engine = REHEARSED_ENGINES[plan.backend.name], plan.engines[group]
    twin = pretend_twin(plan.machine, engine.gpus)
    before = rehearsed.before
    if rehearsed.process_context or engine.settings.communicator == "nccl":
        before = (*before, "communicator")
    ledgers = [ledger.terms for ledger in engine.ledgers]
    # A calibration may make the sum of these terms negative; a pretend card is then charged 0.
    gpus = tuple(
        dataclasses.replace(
            gpu,
            used=gpu.used + max(0, _sum(ledger, before)),
            late=max(0, _sum(ledger, rehearsed.after)),
        )
        for gpu, ledger in zip(twin.gpus, ledgers, strict=True)
    )
    context = 0
    if rehearsed.process_context:
        context = max(_sum(ledger, ("cuda_context",)) for ledger in ledgers)
    return dataclasses.replace(twin, gpus=gpus, context=context)


def _sum(terms: Sequence[Term], names: Sequence[str]) -> int:
    """Return the bytes of all terms that have one of the names."""
    return sum(term.bytes for term in terms if term.term in names)


def broken_promise(plan: Plan, engine: EnginePlan, document: Document) -> AnyEnd | None:
    """Return an end if the engine refused a request that the plan promises to serve; else None.

    The plan promises a prompt only if prompt and answer fit into its context.
    """
    longest = min(engine.settings.session_len, plan.promise.context)
    taken = document["cache"].get("session_len")
    if taken is not None and taken < longest:
        why = f"the engine takes {taken:,} tokens of the {longest:,} that the plan promises"
        return AnyEnd(kind="refused", phase="case text_prefill", where=why)
    room = longest - _NEW
    for case in document["cases"]:
        refused = {name: n for name, n in case["statuses"].items() if name != "finished"}
        if sum(refused.values()) > sum(tokens > room for tokens in case["tokens"]):
            refusals = ", ".join(f"{count} {name}" for name, count in refused.items())
            why = f"the engine refused requests that the plan promises: {refusals}"
            return AnyEnd(kind="refused", phase=f"case {case['name']}", where=why)
    return None


def with_rehearsed_terms(engine: EnginePlan, document: Document) -> tuple[GpuLedger, ...]:
    """Return the engine's ledgers with the rehearsed bytes of each term that has a counter.

    ``rehearsed`` stays None if a term shares its counter with others (``Rehearsal.together``), or
    if only a real card has the term.
    """
    counters = dict(zip(engine.gpus, document["terms"], strict=True))

    def compared(gpu: GpuLedger) -> GpuLedger:
        sizes = counters.get(gpu.index, {})
        terms = (replace(term, rehearsed=sizes.get(term.term)) for term in gpu.terms)
        return replace(gpu, terms=tuple(terms))

    return tuple(map(compared, engine.ledgers))


def terms_by_counter(ledger: Sequence[Term], counters: Mapping[str, int]) -> dict[str, list[Term]]:
    """Return the ledger's terms by the name of the engine's counter that measures them."""
    measured: dict[str, list[Term]] = {}
    for term in ledger:
        counter = _TOGETHER.get(term.term, term.term)
        if counter not in counters and term.phase == "weights" and term.basis != "estimate":
            counter = "weights"
        if counter in counters and not term.term.endswith(".returned"):
            measured.setdefault(counter, []).append(term)
        stays = term.phase == "buffers" and term.basis != "estimate" and term.term != POOL_WARMUP
        if stays and "buffers" in counters:
            # The counter ``buffers`` also includes buffers that have a counter of their own.
            measured.setdefault("buffers", []).append(term)
    return measured


def _together(engine: EnginePlan, document: Document) -> tuple[RehearsedTogether, ...]:
    """Return the counters that measure several terms together, with their bytes on each GPU."""
    ledgers = {ledger.index: ledger.terms for ledger in engine.ledgers}
    counters_of_gpus = list(zip(engine.gpus, document["terms"], strict=True))
    measured = [terms_by_counter(ledgers[index], counters) for index, counters in counters_of_gpus]
    return tuple(
        RehearsedTogether(
            line=name,
            terms=tuple(term.term for term in terms),
            bytes=tuple(sum(term.bytes for term in of_gpu.get(name, ())) for of_gpu in measured),
            rehearsed=tuple(counters.get(name) for _, counters in counters_of_gpus),
        )
        for name, terms in measured[0].items()
        if [term.term for term in terms] != [name]
    )
