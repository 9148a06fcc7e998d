"""Calibrates: sends all worst cases to a plan's engines, and measures the GPUs' memory.

The `Calibrator`, the run's examiner, reads the memory after the warm-up, after one small
request of each kind (for kernels) and after each worst case. Later plans use these readings.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import LaunchError, MachineError, TurbofitError, UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import to_builtins, to_json
from turbofit.core.units import MIB, format_bytes
from turbofit.machine.nvml import GpuLostError, Nvml, answered
from turbofit.measure.calibrate_speeds import is_measured, measure_speeds
from turbofit.measure.calibrate_steps import EngineAddress, StepTimer
from turbofit.memory.account import NO_IMAGES, EngineLaunch
from turbofit.memory.calibrated import calibration_for
from turbofit.planning import calibrations
from turbofit.planning.choose import best_plan
from turbofit.planning.resolve import resolve
from turbofit.serving.calibration import (
    KERNELS,
    SEEN_FILE,
    STEADY,
    CalibratedGpu,
    Observation,
    document,
    learn,
)
from turbofit.serving.engine.worst_requests import (
    every_worst,
    small_requests,
    worst_image_tokens,
    worst_request,
)
from turbofit.serving.ladder import learned_file
from turbofit.serving.planner import leases_for
from turbofit.serving.run import Run
from turbofit.serving.start import follow

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Self

    from turbofit.core.machine import Calibration, MeasuredSteps
    from turbofit.core.plan import Plan
    from turbofit.core.struct import Document
    from turbofit.serving.engine.supervised_engine import SupervisedEngine
    from turbofit.serving.engine.worst_requests import ProbeRequest
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.supervisor import StopSignal

_SECONDS: Final = 0.01
#: Seconds to wait for a running query: a driver that lost a card may never answer.
_LAST_SECONDS: Final = 10.0


class Memory(NamedTuple):
    """The memory of one GPU in bytes, by NVML; ``used`` excludes the driver's own reserve."""

    total: int
    used: int
    free: int


class SampledRange(NamedTuple):
    """The largest and the last number of used bytes of one GPU over some time."""

    peak: int
    last: int


def memory_now(gpu: int | str) -> Memory:
    """Read the memory of a GPU once.

    Args:
        gpu: NVML's index, or a UUID.

    Raises:
        MachineError: the memory cannot be read.
        PackageError: nvidia-ml-py is not installed.
    """
    with Nvml() as nvml:
        return _memory(nvml, gpu)


class Sampler:
    """Samples the used memory of GPUs every few milliseconds until closed; a context manager.

    It may miss a peak shorter than its interval. Allocators that keep their memory (TurboMind's
    pools, torch's segments) show their peak for long.

    Args:
        gpus: NVML's indices, or UUIDs.
        seconds: the interval between samples.
    """

    def __init__(self, gpus: Sequence[int | str], seconds: float = _SECONDS) -> None:
        self._gpus, self._seconds = tuple(gpus), seconds
        self._samples: dict[int | str, list[tuple[float, int]]] = {gpu: [] for gpu in self._gpus}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_LAST_SECONDS)

    def between(self, gpu: int | str, begin: float, end: float) -> SampledRange | None:
        """Return the largest and last used bytes between two `time.monotonic` times.

        None if there is no sample.
        """
        inside = [used for at, used in self._samples[gpu] if begin <= at <= end]
        return SampledRange(peak=max(inside), last=inside[-1]) if inside else None

    def _run(self) -> None:
        with Nvml() as nvml:
            while not self._over.is_set():
                for gpu in self._gpus:
                    with suppress(MachineError):
                        used = _memory(nvml, gpu).used
                        self._samples[gpu].append((time.monotonic(), used))
                self._over.wait(self._seconds)


def _memory(nvml: Nvml, gpu: int | str) -> Memory:
    name = "nvmlDeviceGetHandleByUUID" if isinstance(gpu, str) else "nvmlDeviceGetHandleByIndex"
    try:
        handle = nvml.query(name, gpu)
        info = nvml.memory(handle) if answered(handle) else None
    except GpuLostError as exc:
        raise MachineError(f"GPU {gpu} is lost: {exc}", hint="check nvidia-smi") from None
    if info is None:
        raise MachineError(f"NVML knows no GPU {gpu}", hint="check nvidia-smi -L")
    if not answered(info):
        raise MachineError(f"the memory of GPU {gpu} cannot be read", hint="check nvidia-smi")
    return Memory(total=int(info.total), used=int(info.used), free=int(info.free))


def calibrate(
    config: ServeConfig,
    stop: StopSignal,
    say: Callable[[str], None],
    *,
    again: bool,
    apart: bool,
) -> Document | signal.Signals:
    """Measure a launch and learn from it; return the document, or the signal that ended it early.

    ``config`` is the config of a `serve` without a gateway. A plan that was calibrated before is
    measured only with ``again``. With ``apart`` the learned values hold for pretend GPUs only.

    Raises:
        UsageError: the model is planned for Transformers, for which nothing can be learned.
    """
    calibrator = Calibrator(PretendUsageReader if config.pretend else NvmlUsageReader, say)
    with leases_for(config) as leases:
        run = Run(config, leases, say, on_open=lambda _: stop.end(), examiner=calibrator)
        plan = run.choose()
        if not plan.backend.of_lmdeploy:
            raise UsageError(
                f"{plan.model.name} is planned for Transformers: calibrate measures LMDeploy",
                hint="turbofit serve checks its plan with a worst-case request",
            )
        if calibration_of(plan) is not None and not again:
            say("calibrated before: --again measures again, --forget drops it")
            return stored(plan) | {"tokens": _tokens(run, plan, apart=apart)}
        machine = run.refuse().machine
        gpus = sorted(index for group in plan.groups for index in group)
        unknown = again or not is_measured(machine, gpus)
        # It takes memory that the plan has reserved.
        if unknown and not (config.pretend or apart) and measure_speeds(machine, gpus, say):
            run.choose()
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
        with suppress(TurbofitError):  # on a full disk `turbofit report --share` has less to tell
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
    """Return how many KV tokens plans for these cards have: ``assumed`` and ``measured``.

    ``assumed`` is without any calibration, ``measured`` with all stored calibrations.
    """
    assert run.config.request is not None
    request = run.config.request.changed(on=plan.machine, gpus=None)
    known = calibrations.with_calibrations(plan.machine, pretend=apart).calibrations
    # `resolve` adds the calibrations of the cards here: each of these plans replaces them.
    resolved = resolve(request)
    return {
        name: best_plan(
            replace(resolved, machine=replace(resolved.machine, calibrations=made)), request.engine
        ).kv_tokens
        for name, made in (("assumed", ()), ("measured", known))
    }


#: Bytes by which other processes' use may change while a launch is measured.
_MOVED: Final = 32 * MIB


def learned(
    plan: Plan,
    observations: Sequence[Observation],
    before: Mapping[int, int],
    *,
    lmdeploy: str,
    pretend: bool,
) -> Document:
    """Learn and store calibrations; return the document of `turbofit calibrate --json`.

    ``before``: bytes in use on each GPU before the last start; empty if no other process uses them.
    Nothing is stored if other processes' memory has changed meanwhile.
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
    """Delete the settings that failed starts led to; return whether any were deleted.

    Their larger margin would be added to the bytes that the calibration found missing. The settings
    stay if the calibration found no bytes missing, or was not stored.
    """
    more = any(row["context"] + row["buffers"] > 0 for row in result["calibrations"])
    kept = bool(result["kept"])
    return kept and more and learned_file(plan, lmdeploy, pretend=pretend).forget()


def calibration_of(plan: Plan) -> Calibration | None:
    launch = EngineLaunch(
        model=plan.model,
        settings=plan.engines[0].settings,
        gpus=tuple(plan.machine.gpu(index) for index in plan.groups[0]),
        machine=plan.machine,
        vision_load=NO_IMAGES,
    )
    return calibration_for(launch, plan.backend.name, plan.backend.version)


def stored(plan: Plan) -> Document:
    """Return the stored document of the calibration that a plan uses."""
    calibration = calibration_of(plan)
    assert calibration is not None
    body = calibrations.read(calibration)
    return {
        "schema": "turbofit.calibration/1", **body, "calibrations": [to_builtins(calibration)],
        "kept": [str(calibrations.path_of(calibration))], "why_not": None,
    }  # fmt: skip


def _moved(plan: Plan, before: Mapping[int, int]) -> str | None:
    """Return a message if the memory of other processes on a GPU has changed since ``before``.

    None if no change is larger than noise. A change would be counted as the engine's memory.
    """
    for gpu in plan.ledgers:
        if gpu.index in before:
            more = memory_now(gpu.uuid).used - before[gpu.index]
            if abs(more) > _MOVED:
                change = f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'} in use"
                return f"GPU {gpu.index} has {change} than before: somebody else's memory moved"
    return None


_REQUEST: Final = "vision_request"
#: Seconds for which a card is sampled before a reading, whose last sample is then recent.
_SETTLE: Final = 0.3


class NvmlUsageReader:
    """Reads the bytes in use on each GPU of a plan, of all processes together.

    ``before``: bytes in use before the engines start, by the machine's index.

    Raises:
        MachineError: a GPU cannot be read.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._uuids = plan, {gpu.index: gpu.uuid for gpu in plan.ledgers}
        self.before = {index: memory_now(uuid).used for index, uuid in self._uuids.items()}
        self._sampler = Sampler(list(self._uuids.values()))
        self._sampler.__enter__()
        self._since = dict.fromkeys(self._uuids, time.monotonic())

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the highest use since this engine's last reading, and the use now, by GPU.

        Raises:
            MachineError: a GPU did not answer during the reading.
        """
        time.sleep(_SETTLE)
        now, spans = time.monotonic(), {}
        for index in self.plan.groups[engine.group]:
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
    """Reads the bytes that pretend GPUs hold.

    Their peaks cannot be reset, so a reading has a new peak only if it exceeds all earlier peaks.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.before = {gpu.index: gpu.used for gpu in plan.ledgers}
        self._highest: dict[int, int] = {}

    def read(self, engine: SupervisedEngine) -> dict[int, SampledRange]:
        """Return the bytes in use on each pretend GPU: now, and at the peak since the last reading.

        If the highest peak has not risen since then, the bytes in use now count as the peak.

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
        """Do nothing; see `NvmlUsageReader`."""


if TYPE_CHECKING:
    GpuUsage = NvmlUsageReader | PretendUsageReader


class Calibrator:
    """The `Examiner` of a calibration: sends an engine all worst cases, reads memory after each.

    `begin` drops the observations of an earlier plan's engines.
    """

    def __init__(self, usage_of: Callable[[Plan], GpuUsage], say: Callable[[str], None]) -> None:
        self._usage_of, self._say = usage_of, say
        self.usage: GpuUsage | None = None
        self._observations: dict[int, Observation] = {}
        #: Engines are timed one after another, and one of each kind of cards.
        self._timing, self._timed = threading.Lock(), set[tuple[str, ...]]()

    @property
    def observations(self) -> tuple[Observation, ...]:
        """Observations of the engines that were measured completely, by group."""
        return tuple(self._observations[group] for group in sorted(self._observations))

    @property
    def complete(self) -> bool:
        """Whether every group of the plan was measured completely."""
        groups = None if self.usage is None else len(self.usage.plan.groups)
        return len(self._observations) == groups

    def begin(self, plan: Plan) -> None:
        self.end()
        self.usage, self._observations = self._usage_of(plan), {}
        self._timed.clear()

    def end(self) -> None:
        if self.usage is not None:
            self.usage.end()

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        usage, observations = self.usage, self._observations  # of the engine's own plan
        assert usage is not None
        observations.pop(engine.group, None)  # an engine that starts again is measured again
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
        plan = usage.plan
        used: dict[int, dict[str, int]] = {}

        def take(name: str) -> None:
            sizes: dict[int, int] = {}
            for index, span in usage.read(engine).items():
                # Memory in use after a worst case also belongs to it: pools keep their largest
                # size.
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
        for question in every_worst(plan, engine.planned, model, text):
            drive(question, question.name)
        budget = engine.tracker.budget
        free, region = (None, None) if budget is None else (budget.free, budget.budget)
        cards = tuple(
            CalibratedGpu(index=index, before=usage.before[index], used=sizes)
            for index, sizes in used.items()
        )
        steps = self._steps(plan, engine, model)
        return Observation(group=engine.group, free=free, region=region, cards=cards, steps=steps)

    def _steps(self, plan: Plan, engine: SupervisedEngine, model: str) -> MeasuredSteps | None:
        """Return the timed forwards of an engine; None where forwards take no time, or were timed.

        Pretend GPUs without a clock take no time.
        """
        names = tuple(sorted(gpu.name for gpu in engine.planned.ledgers))
        with self._timing:
            if names in self._timed or (engine.pretended is not None and engine.clock is None):
                return None
            self._timed.add(names)
            address = EngineAddress(engine.url, model, engine.client.key)
            try:
                return StepTimer(plan, engine.planned, address, engine.clock).measure(
                    lambda what: tell(Step(f"{engine.name}: timing {what}"))
                )
            except UsageError as exc:
                self._say(f"warning: no step is kept: {exc.message}")
                return None
