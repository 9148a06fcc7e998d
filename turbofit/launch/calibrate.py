"""One calibration: a run whose engines are driven through their worst cases, and what it taught."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import LaunchError, MachineError, TurbofitError, UsageError
from turbofit.core.plan import PLAN_SCHEMA, Plan
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, tell
from turbofit.core.process.state import digest_of_parts
from turbofit.core.struct import Struct, to_builtins, to_json
from turbofit.core.units import MIB, format_bytes
from turbofit.launch.engine.worst_requests import (
    every_worst,
    small_requests,
    worst_image_tokens,
    worst_request,
)
from turbofit.launch.run import Run
from turbofit.launch.serve.ladder import forget
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.runs import StateFile
from turbofit.memory.calibrated import calibration_for, identity
from turbofit.model.source import resolve_model
from turbofit.observe import calibrations
from turbofit.observe.calibration import (
    KERNELS,
    SEEN_FILE,
    STEADY,
    CalibratedGpu,
    Observation,
    document,
    learn,
)
from turbofit.observe.sampler import SampledRange, Sampler, memory_now
from turbofit.planning.plan import plan as best_plan

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from turbofit.core.json_types import Document, Options
    from turbofit.core.machine import Calibration
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.engine.worst_requests import ProbeRequest
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest


def calibrate(
    config: ServeConfig,
    progress: Progress,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    """Measure and learn.

    Args:
        config: of a `serve` without a public side.
        progress: how far an earlier run of the same calibration came.
        stop: tells of signals.
        say: takes lines of progress.
        again: whether what was calibrated before is measured again.
        apart: whether what is learned holds for pretend GPUs only.

    Returns:
        What was learned, or the signal that ended it before it was complete.
    """
    calibrator = Calibrator(
        PretendUsageReader if config.pretend else NvmlUsageReader, progress, say
    )
    with Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        run.plan = progress.plan
        if run.plan is not None and run.again():
            say("going on where an earlier calibration was cut short")
            plan = run.refuse()
        else:
            if progress.plan is not None:
                say("an earlier calibration was cut short, and does not go on")
            plan = run.choose()
            if not plan.engine.of_lmdeploy:
                raise UsageError(
                    f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                    hint="turbofit serve checks its plan with a worst-case request",
                )
            if calibration_of(plan) is not None and not again:
                say("calibrated before: --again measures again, --forget drops it")
                return stored(plan) | {"tokens": _tokens(run, plan, apart=apart)}
            plan = run.refuse()
        say(plan.verdict)
        run.begin()
        try:
            ended = run.follow(stop)
        finally:
            calibrator.end()
        if not progress.complete:
            say("stopped: what was measured is kept, and the same command goes on from there")
            return ended
        assert progress.plan is not None
        assert calibrator.usage is not None
        before = {} if config.pretend else calibrator.usage.before
        with suppress(TurbofitError):  # a full disk costs what `turbofit share` would tell
            write_atomic(run.folder / SEEN_FILE, to_json(progress.seen), mode=0o600)
        lmdeploy = run.lmdeploy.version
        result = learned(progress.plan, progress.seen, before, lmdeploy=lmdeploy, pretend=apart)
        progress.forget()
        if result["kept"]:
            result["tokens"] = _tokens(run, progress.plan, apart=apart)
        else:
            say(f"warning: nothing was learned: {result['why_not']}")
        if relieve(progress.plan, result, lmdeploy, pretend=config.pretend):
            say("what restarts had learned is dropped: this measurement says what was missing")
        return result


def _tokens(run: Run, plan: Plan, *, apart: bool) -> Document:
    """KV tokens of a plan for these cards: as was assumed of them, and with what was measured."""
    assert run.config.request is not None
    request = run.config.request.changed(gpus=None)
    known = calibrations.with_calibrations(plan.machine, pretend=apart)
    machines = {"assumed": replace(known, calibrations=()), "measured": known}
    return {
        name: best_plan(request.changed(on=machine)).kv.total_tokens
        for name, machine in machines.items()
    }


def progress_of(request: PlanRequest, *, apart: bool) -> Progress:
    """How far an earlier run of the same calibration came."""
    options = request.given()
    return Progress(options.pop("model"), options, pretend=apart)


def drop(request: PlanRequest, *, apart: bool) -> int:
    """Forget what was learned of a model; how many calibrations there were."""
    assert isinstance(request.model, str)
    return calibrations.forget(identity(resolve_model(request.model)), pretend=apart)


def forget_all(request: PlanRequest, *, apart: bool) -> str:
    """Forget what was learned of a model, and what is under way; what there was, in words."""
    gone = drop(request, apart=apart)
    left = progress_of(request, apart=apart).forget()
    return f"forgot {gone} calibrations{' and one that was under way' if left else ''}"


# From what was read to what later plans know, and back.


#: Bytes by which others may have moved while a launch was measured.
_MOVED_MEANWHILE: Final = 32 * MIB


def learned(
    plan: Plan,
    seen: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn, and keep it for later plans, of pretend GPUs apart.

    ``before`` are bytes in use on each GPU before the last start; empty where others cannot move.
    The document is what `turbofit calibrate --json` shows. ``kept`` is empty where nothing was
    learned, and ``why_not`` says why.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = learn(plan, seen, lmdeploy=lmdeploy, when=when, pretend=pretend)
    found = tuple(calibrations.completed(one) for one in made)
    beside = {**document(plan, seen), "pretend": pretend}
    why_not, kept = _moved(plan, before), []
    if why_not is None:
        try:
            kept = [str(calibrations.keep(one, beside)) for one in found]
        except OSError as exc:
            why_not = f"the state folder cannot be written: {exc.strerror or exc}"
        except UsageError as exc:
            why_not = exc.message
    return {
        "schema": "turbofit.calibration/1",
        "calibrations": to_builtins(found),
        "kept": kept,
        "why_not": why_not,
        **beside,
    }


def relieve(plan: Plan, result: Document, lmdeploy: str, *, pretend: bool) -> bool:
    """Drop what restarts had learned of such launches, where the measurement replaces it.

    Otherwise a margin that the ladder made larger would be added to what was measured to be
    missing. Where nothing was measured to be missing, what helped the start stays.

    Returns:
        Whether anything was dropped.
    """
    more = any(one["context"] + one["buffers"] > 0 for one in result["calibrations"])
    return bool(result["kept"]) and more and forget(plan, lmdeploy, pretend=pretend)


def calibration_of(plan: Plan) -> Calibration | None:
    """What the plan's first engine rests on."""
    gpus = [plan.machine.gpu(index) for index in plan.parallel.groups[0]]
    settings, engine = plan.of_group(0).settings, plan.engine
    return calibration_for(plan.machine, gpus, plan.model, settings, engine.name, engine.version)


def stored(plan: Plan) -> Document:
    """The document that was kept of what a plan rests on, as far as it can be read."""
    one = calibration_of(plan)
    assert one is not None
    body = calibrations.read(one)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(one)],
        "kept": [str(calibrations.path_of(one))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Whether somebody else took or gave memory meanwhile, which would be counted as ours."""
    for gpu in plan.gpus:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED_MEANWHILE:
                said = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {said} than before: somebody else's memory moved"
    return None


# Drives engines through all that their plan pays for, and reads their GPUs after each step: after
# the warm-up; one small request of each kind, for kernels; then each worst case. What a step showed
# is on disk at once, so that a run that was cut short goes on after it.


_REQUEST: Final = "vision_request"
#: Seconds that a card is sampled before a reading counts as its last.
_SETTLE: Final = 0.3


class NvmlUsageReader:
    """What real GPUs of a plan that is launched hold, in bytes of the whole card, everybody's.

    ``before`` are those in use before the engines are started, by the machine's index.

    Raises:
        MachineError: one cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._uuids = plan, {one.index: one.uuid for one in plan.gpus}
        self.before = {index: memory_now(uuid).used for index, uuid in self._uuids.items()}
        self._sampler = Sampler(list(self._uuids.values()))
        self._sampler.__enter__()
        self._since = dict.fromkeys(self._uuids, time.monotonic())

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """The most since the last reading of this engine, and now.

        Raises:
            MachineError: what a GPU held after its last answer is not known.
        """
        time.sleep(_SETTLE)
        now, found = time.monotonic(), {}
        for index in self.plan.parallel.groups[engine.group]:
            uuid = self._uuids[index]
            span = self._sampler.between(uuid, self._since[index], now)
            if span is None or self._sampler.between(uuid, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            found[index], self._since[index] = span, now
        return found

    def end(self) -> None:
        self._sampler.__exit__()


class PretendUsageReader:
    """What pretend GPUs hold, by their timeline. A peak is told where it is the highest yet."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {one.index: one.used for one in plan.gpus}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        found = {}
        for seen in engine.pretended.seen() if engine.pretended is not None else ():
            # Before the first reading the peak is that of loading.
            new = seen.peak > self._highest.get(seen.gpu, seen.peak)
            found[seen.gpu] = SampledRange(peak=seen.peak if new else seen.held, last=seen.held)
            self._highest[seen.gpu] = seen.peak
        if not found:
            raise MachineError("the pretend GPUs' account cannot be read", hint="see the log")
        return found

    def end(self) -> None:
        """See `NvmlUsageReader`."""


if TYPE_CHECKING:
    GpuUsage = NvmlUsageReader | PretendUsageReader


class Calibrator:
    """An examiner of engines; ``progress`` is what earlier runs have shown already."""

    def __init__(
        self, usage_of: Callable[[Plan], GpuUsage], progress: Progress, say: Callable[[str], None]
    ) -> None:
        self._usage_of, self._progress, self._say = usage_of, progress, say
        #: Of the plan that was launched last.
        self.usage: GpuUsage | None = None
        self._lock = threading.Lock()

    def begin(self, plan: Plan) -> None:
        with self._lock:
            self.end()
            self.usage = self._usage_of(plan)
            self._progress.begin(plan, self.usage.before)

    def end(self) -> None:
        if self.usage is not None:
            self.usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        assert self.usage is not None
        try:
            self._examine(self.usage, engine, model, ask)
        except LaunchError:
            raise
        except TurbofitError as exc:  # a GPU, or an engine of an earlier plan, cannot be read
            raise LaunchError(exc.message, hint=exc.hint) from None

    def _examine(
        self, usage: GpuUsage, engine: SupervisedEngine, model: str,
        ask: Callable[[ProbeRequest], int],
    ) -> None:  # fmt: skip
        plan = usage.plan.of_group(engine.group)
        self._take(usage, engine, STEADY)
        for small in small_requests(plan, model):
            ask(small)
        self._take(usage, engine, KERNELS)
        worst = worst_request(plan, model)
        if worst is not None:
            tokens = self._drive(usage, engine, _REQUEST, worst, ask)
            if tokens is not None:
                text = max(0, tokens - worst_image_tokens(plan))
                with self._progress_of(usage, engine) as progress:
                    progress.texts[engine.group] = text
        text = self._progress.texts.get(engine.group, 0)
        for question in every_worst(plan, model, text):
            self._drive(usage, engine, question.name, question, ask)
        with self._progress_of(usage, engine) as progress:
            progress.finish(engine.group)

    @contextmanager
    def _progress_of(self, usage: GpuUsage, engine: SupervisedEngine) -> Iterator[Progress]:
        """What was read so far, while its plan is the launched one.

        Raises:
            MachineError: it is not any more, and the engine has ended.
        """
        with self._lock:
            if self.usage is not usage:
                what = f"{engine.name} has ended: another plan is launched"
                raise MachineError(what, hint="see the log")
            yield self._progress

    def _drive(
        self,
        usage: GpuUsage,
        engine: SupervisedEngine,
        name: str,
        question: ProbeRequest,
        ask: Callable[[ProbeRequest], int],
    ) -> int | None:
        """Ask and read; None where that was done before."""
        if self._progress.has(engine.group, name):
            self._say(f"{engine.name}: {name}: measured before")
            return None
        tell(Step(f"{engine.name}: measuring {name}"))
        tokens = ask(question)
        self._take(usage, engine, name)
        return tokens

    def _take(self, usage: GpuUsage, engine: SupervisedEngine, name: str) -> None:
        """Read, and keep it. What was in use after a step belongs to it too: pools keep their most.

        What the engine's log says of its cache comes with the first step that finds it: the reader
        of the log may be late.
        """
        spans = usage.read(engine)
        steady = name in (STEADY, KERNELS)
        used = {i: span.last if steady else max(span) for i, span in spans.items()}
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        with self._progress_of(usage, engine) as progress:
            cards = tuple(
                CalibratedGpu(index=i, before=usage.before[i], used={name: used[i]}) for i in used
            )
            progress.add(Observation(group=engine.group, free=free, region=region, cards=cards))
        most = max(used, key=lambda i: used[i])
        self._say(f"{engine.name}: {name}: GPU {most} has {format_bytes(used[most])} in use")


# How far a calibration has come, on disk after every step; of one plan and one set of options.


#: Bytes that others may hold more or less for readings of two starts to belong together.
_MOVED: Final = 16 * MIB


class _Pages(Struct, tag_field="schema", tag="turbofit.calibrating/1"):
    """``texts`` are tokens beside the images of a worst request, by group."""

    plan: Plan | None = None
    seen: tuple[Observation, ...] = ()
    texts: dict[int, int] = msgspec.field(default_factory=dict)


class Progress:
    """What was read so far for a model as it was asked for, on pretend GPUs apart.

    ``options`` are the planner's keywords, and what else a run's result depends on.
    """

    def __init__(self, model: str, options: Options, *, pretend: bool) -> None:
        key = json.dumps([model, sorted((k, str(v)) for k, v in options.items())])
        room = "calibrating-pretend" if pretend else "calibrating"
        self._file = StateFile(room, digest_of_parts(key), _Pages)
        pages = self._file.read() or _Pages()
        if pages.plan is not None and pages.plan.schema != PLAN_SCHEMA:
            pages = _Pages()
        self.plan, self.texts = pages.plan, dict(pages.texts)
        self._seen = {one.group: one for one in pages.seen}
        self._finished: set[int] = set()

    @property
    def seen(self) -> tuple[Observation, ...]:
        """By group."""
        return tuple(self._seen[group] for group in sorted(self._seen))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan has shown everything, and has started in this process.

        An earlier process may have read while others had given memory back that they hold again
        now, so that one start in this process is needed.
        """
        return self.plan is not None and len(self._finished) == len(self.plan.parallel.groups)

    def begin(self, plan: Plan, before: Mapping[int, int]) -> None:
        """A plan is launched; what was read of another one no longer counts.

        What was read while others held another amount does not count either: the cache had another
        size.
        """
        cards = [card for one in self._seen.values() for card in one.cards]
        moved = any(
            card.index not in before or abs(card.before - before[card.index]) > _MOVED
            for card in cards
        )
        if self.plan is None or _kind(plan) != _kind(self.plan) or moved:
            self._seen, self._finished, self.texts = {}, set(), {}
            self.plan = plan
        self._write()

    def has(self, group: int, name: str) -> bool:
        """Whether a step was read before."""
        one = self._seen.get(group)
        return one is not None and all(name in card.used for card in one.cards)

    def add(self, more: Observation) -> None:
        """Keep a reading, and those of an earlier start where both found and took the same.

        Others may have given memory back while that was measured, and taken as much again since.
        Under: they did so after its first reading.
        """
        one = self._seen.get(more.group)
        if one is not None and _differs(one, more):
            one = None
            self._finished.discard(more.group)
            self.texts.pop(more.group, None)
        self._seen[more.group] = more if one is None else joined(one, more)
        self._write()

    def finish(self, group: int) -> None:
        """All of a group's steps were read, now or before this process."""
        self._finished.add(group)

    def forget(self) -> bool:
        """Drop it; whether there was anything."""
        return self._file.forget()

    def _write(self) -> None:
        self._file.write(_Pages(plan=self.plan, seen=self.seen, texts=self.texts))


def joined(one: Observation, more: Observation) -> Observation:
    """Two readings of one group; the later one is counted with what others held at the first."""
    cards = []
    for card in one.cards:
        other = next((c for c in more.cards if c.index == card.index), None)
        moved = 0 if other is None else card.before - other.before
        new = {} if other is None else {name: v + moved for name, v in other.used.items()}
        cards.append(replace(card, used={**card.used, **new}))
    free, region = one.free, one.region
    if free is None and more.free is not None:
        free, region = more.free, more.region
    return replace(one, cards=tuple(cards), free=free, region=region)


def _differs(one: Observation, more: Observation) -> bool:
    """Whether two starts of one group found, or took, different amounts before any request."""
    if one.free is not None and more.free is not None and abs(one.free - more.free) > 2 * _MOVED:
        return True
    taken = {
        card.index: card.used[STEADY] - card.before for card in one.cards if STEADY in card.used
    }
    return any(
        abs(card.used[STEADY] - card.before - taken[card.index]) > _MOVED
        for card in more.cards
        if STEADY in card.used and card.index in taken
    )


def _kind(plan: Plan) -> tuple[Any, ...]:
    """What must be the same for readings to belong together."""
    settings = [one.settings for one in plan.by_group] or plan.settings
    return (plan.engine, settings, plan.limits, plan.parallel.groups, plan.model.parameters)
