"""One calibration: a run whose engines are driven through all that their plan pays for.

Its examiner, the `Calibrator`, reads the GPUs after each step: after the warm-up; after one small
request of each kind, for kernels; after each worst case. What it saw is learned for later plans.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, MachineError, TurbofitError, UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import to_builtins, to_json
from turbofit.core.units import MIB, format_bytes
from turbofit.launch.engine.worst_requests import (
    every_worst,
    small_requests,
    worst_image_tokens,
    worst_request,
)
from turbofit.launch.follow import follow
from turbofit.launch.run import Run
from turbofit.launch.serve.ladder import forget
from turbofit.launch.serve.leases import Leases
from turbofit.memory.account import NO_IMAGES, EngineLaunch
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
from turbofit.planning.resolve import resolve
from turbofit.tuner.choose import best_plan

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.json_types import Document
    from turbofit.core.machine import Calibration
    from turbofit.core.plan import Plan
    from turbofit.launch.engine.supervised_engine import SupervisedEngine
    from turbofit.launch.engine.worst_requests import ProbeRequest
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest


def calibrate(
    config: ServeConfig,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    """Measure and learn; the document, or the signal that ended it before it was complete.

    ``config`` is of a `serve` without a public side. ``again``: what was calibrated before is
    measured again; ``apart``: what is learned holds for pretend GPUs only.

    Raises:
        UsageError: the model is planned for Transformers, which has nothing to learn.
    """
    calibrator = Calibrator(PretendUsageReader if config.pretend else NvmlUsageReader, say)
    with Leases() as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        plan = run.choose()
        if not plan.engine.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if calibration_of(plan) is not None and not again:
            say("calibrated before: --again measures again, --forget drops it")
            return stored(plan) | {"tokens": _tokens(run, plan, apart=apart)}
        say(run.refuse().verdict)
        run.begin()
        try:
            ended = follow(run, stop)
        finally:
            calibrator.end()
        if not calibrator.complete:
            say("stopped: nothing was learned")
            return ended
        assert calibrator.usage is not None
        plan, before = calibrator.usage.plan, {} if config.pretend else calibrator.usage.before
        with suppress(TurbofitError):  # a full disk costs what `turbofit share` would tell
            write_atomic(run.folder / SEEN_FILE, to_json(calibrator.observations), mode=0o600)
        lmdeploy = run.lmdeploy.version
        result = learned(plan, calibrator.observations, before, lmdeploy=lmdeploy, pretend=apart)
        if result["kept"]:
            result["tokens"] = _tokens(run, plan, apart=apart)
        else:
            say(f"warning: nothing was learned: {result['why_not']}")
        if relieve(plan, result, lmdeploy, pretend=config.pretend):
            say("what restarts had learned is dropped: this measurement says what was missing")
        return result


def _tokens(run: Run, plan: Plan, *, apart: bool) -> Document:
    """KV tokens of a plan for these cards: as was assumed of them, and with what was measured."""
    assert run.config.request is not None
    request = run.config.request.changed(on=plan.machine, gpus=None)
    known = calibrations.with_calibrations(plan.machine, pretend=apart).calibrations
    # Whoever plans for the cards here adds what was measured: both are planned below that.
    resolved = resolve(request)
    return {
        name: best_plan(
            replace(resolved, machine=replace(resolved.machine, calibrations=made)), request.engine
        ).kv.total_tokens
        for name, made in (("assumed", ()), ("measured", known))
    }


def drop(request: PlanRequest, *, apart: bool) -> int:
    """Forget what was learned of a model; how many calibrations there were."""
    assert isinstance(request.model, str)
    return calibrations.forget(identity(resolve_model(request.model)), pretend=apart)


#: Bytes by which others may have moved while a launch was measured.
_MOVED: Final = 32 * MIB


def learned(
    plan: Plan,
    observations: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn, and keep it for later plans; the document is what `turbofit calibrate --json` shows.

    ``before`` are bytes in use on each GPU before the last start; empty where others cannot move.
    """
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    corrections = learn(plan, observations, lmdeploy=lmdeploy, when=when, pretend=pretend)
    completed = tuple(calibrations.completed(correction) for correction in corrections)
    beside = {**document(plan, observations), "pretend": pretend}
    why_not, kept = _moved(plan, before), []
    if why_not is None:
        try:
            kept = [str(calibrations.keep(calibration, beside)) for calibration in completed]
        except OSError as exc:
            why_not = f"the state folder cannot be written: {exc.strerror or exc}"
        except UsageError as exc:
            why_not = exc.message
    return {
        "schema": "turbofit.calibration/1",
        "calibrations": to_builtins(completed),
        "kept": kept,
        "why_not": why_not,
        **beside,
    }


def relieve(plan: Plan, result: Document, lmdeploy: str, *, pretend: bool) -> bool:
    """Drop what restarts had learned of such launches; whether there was anything.

    Otherwise a margin that the ladder made larger would be added to what was measured to be
    missing. Where nothing was, what helped the start stays.
    """
    more = any(row["context"] + row["buffers"] > 0 for row in result["calibrations"])
    return bool(result["kept"]) and more and forget(plan, lmdeploy, pretend=pretend)


def calibration_of(plan: Plan) -> Calibration | None:
    launch = EngineLaunch(
        model=plan.model,
        settings=plan.of_group(0).settings,
        gpus=tuple(plan.machine.gpu(index) for index in plan.parallel.groups[0]),
        machine=plan.machine,
        vision_load=NO_IMAGES,
    )
    return calibration_for(launch, plan.engine.name, plan.engine.version)


def stored(plan: Plan) -> Document:
    """The document that was kept of what a plan rests on, as far as it can be read."""
    calibration = calibration_of(plan)
    assert calibration is not None
    body = calibrations.read(calibration)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(calibration)],
        "kept": [str(calibrations.path_of(calibration))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Whether somebody else took or gave memory meanwhile, which would be counted as ours."""
    for gpu in plan.gpus:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED:
                change = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {change} than before: somebody else's memory moved"
    return None


_REQUEST: Final = "vision_request"
#: Seconds that a card is sampled before a reading counts as its last.
_SETTLE: Final = 0.3


class NvmlUsageReader:
    """What the GPUs of a plan hold, in bytes of the whole card, everybody's.

    ``before`` are those in use before the engines start, by the machine's index.

    Raises:
        MachineError: one cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._uuids = plan, {gpu.index: gpu.uuid for gpu in plan.gpus}
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
        now, spans = time.monotonic(), {}
        for index in self.plan.parallel.groups[engine.group]:
            uuid = self._uuids[index]
            span = self._sampler.between(uuid, self._since[index], now)
            if span is None or self._sampler.between(uuid, now - _SETTLE, now) is None:
                raise MachineError(
                    f"GPU {index} did not answer NVML", hint="turbofit doctor says more"
                )
            spans[index], self._since[index] = span, now
        return spans

    def end(self) -> None:
        self._sampler.__exit__()


class PretendUsageReader:
    """What pretend GPUs hold, by their timeline. A peak is told where it is the highest yet."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {gpu.index: gpu.used for gpu in plan.gpus}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """What each pretend GPU holds now.

        Raises:
            MachineError: the account of the pretend GPUs cannot be read.
        """
        spans = {}
        for usage in engine.pretended.usages() if engine.pretended is not None else ():
            # Before the first reading the peak is that of loading.
            new, used = usage.peak > self._highest.get(usage.gpu, usage.peak), usage.in_use
            spans[usage.gpu] = SampledRange(peak=usage.peak if new else used, last=used)
            self._highest[usage.gpu] = usage.peak
        if not spans:
            raise MachineError("the pretend GPUs' account cannot be read", hint="see the log")
        return spans

    def end(self) -> None:
        """See `NvmlUsageReader`."""


if TYPE_CHECKING:
    GpuUsage = NvmlUsageReader | PretendUsageReader


class Calibrator:
    """The `Examiner` of a calibration; what engines of an earlier plan show counts for nothing."""

    def __init__(self, usage_of: Callable[[Plan], GpuUsage], say: Callable[[str], None]) -> None:
        self._usage_of, self._say = usage_of, say
        self.usage: GpuUsage | None = None
        self._observations: dict[int, Observation] = {}

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What was read of engines that have shown everything, by group."""
        return tuple(self._observations[group] for group in sorted(self._observations))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan has shown everything."""
        groups = None if self.usage is None else len(self.usage.plan.parallel.groups)
        return len(self._observations) == groups

    def begin(self, plan: Plan) -> None:
        self.end()
        self.usage, self._observations = self._usage_of(plan), {}

    def end(self) -> None:
        if self.usage is not None:
            self.usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        usage, observations = self.usage, self._observations  # of the engine's own plan
        assert usage is not None
        observations.pop(engine.group, None)  # an engine that starts again shows all again
        try:
            observations[engine.group] = self._observe(usage, engine, model, ask)
        except LaunchError:
            raise
        except TurbofitError as exc:
            raise LaunchError(exc.message, hint=exc.hint) from None

    def _observe(
        self, usage: GpuUsage, engine: SupervisedEngine, model: str,
        ask: Callable[[ProbeRequest], int],
    ) -> Observation:  # fmt: skip
        plan = usage.plan.of_group(engine.group)
        used: dict[int, dict[str, int]] = {}

        def take(name: str) -> None:
            sizes: dict[int, int] = {}
            for index, span in usage.read(engine).items():
                # What is in use after a worst case belongs to it, too: pools keep their most.
                sizes[index] = span.last if name in (STEADY, KERNELS) else max(span)
                used.setdefault(index, {})[name] = sizes[index]
            most = max(sizes, key=lambda index: sizes[index])
            self._say(f"{engine.name}: {name}: GPU {most} has {format_bytes(sizes[most])} in use")

        def drive(question: ProbeRequest, name: str) -> int:
            tell(Step(f"{engine.name}: measuring {name}"))
            tokens = ask(question)
            take(name)
            return tokens

        tell(Step(f"{engine.name}: measuring"))
        take(STEADY)
        for small in small_requests(plan, model):
            ask(small)
        take(KERNELS)
        text, worst = 0, worst_request(plan, model)
        if worst is not None:
            text = max(0, drive(worst, _REQUEST) - worst_image_tokens(plan))
        for question in every_worst(plan, model, text):
            drive(question, question.name)
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        cards = tuple(
            CalibratedGpu(index=index, before=usage.before[index], used=sizes)
            for index, sizes in used.items()
        )
        return Observation(group=engine.group, free=free, region=region, cards=cards)
