"""`turbofit tune`: what there is to try under which load, the trials, and what is kept of them."""

from __future__ import annotations

import math
import signal
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.progress import Step, part_of
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct, const, to_json
from turbofit.core.tuning import CurvePoint, EarlierTuning, SpeedFactor, TrialRecord, Tuning
from turbofit.core.units import format_duration
from turbofit.core.version import __version__
from turbofit.launch.run import Run
from turbofit.launch.serve.runs import waiting_words
from turbofit.launch.tune.runner import TrialEnd, TrialRunner, figures_of
from turbofit.launch.tune.search import TrialSearch, meets
from turbofit.launch.tune.space import choices, mean_request, smaller_limit
from turbofit.memory.calibrated import identity
from turbofit.observe.tuned import (
    cards_of,
    keep_tuned,
    plain,
    promise_of,
    recall_tuned,
    tuned_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Goal, Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.tune.space import TrialChoice
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

#: Seconds that a trial measures, where nobody says.
_SECONDS: Final = 30.0
#: The most requests at once of a load that nobody described.
_MOST_AT_ONCE: Final = 128


class TuneRequest(NamedTuple):
    """What is to be tuned: a promise, under a load.

    ``seconds`` bounds all of it from ``began`` on, by the monotonic clock; ``apart``: what is found
    holds for pretend GPUs only; ``again``: what was tuned before is tried again.
    """

    request: PlanRequest
    load: LoadSpec
    slo: dict[str, float]
    kv_types: tuple[int, ...]
    starts: int
    seconds: float
    began: float
    apart: bool
    again: bool


def tune_model(
    wanted: TuneRequest, config: ServeConfig, leases: Leases, say: Callable[[str], None]
) -> Tuning | signal.Signals:
    """Try settings, and keep the best for later plans; the signal where one ended it.

    ``config`` is of each trial; its request is planned here.
    """
    run = Run(config, leases, say)
    run.plan = run.planner.make({})
    usual = run.refuse()
    if not usual.engine.of_lmdeploy:
        raise UsageError(
            f"{usual.model.name} is planned for Transformers: tune tries LMDeploy's settings",
            hint="turbofit serve serves it",
        )
    assert config.request is not None
    task = _task(wanted, config.request, usual, run.lmdeploy.version, say)
    before = _tuned_before(task)
    known = next((one for one in before if one.lmdeploy == run.lmdeploy.version), None)
    if known is not None and not wanted.again:
        say("tuned before: --again tries again, --forget drops it")
        return known
    earlier = next((one for one in before if one.lmdeploy != run.lmdeploy.version), None)
    key = tuned_key(*task.facts.values(), task.load.given(), task.goal, task.slo)
    journal = Journal(key, pretend=wanted.apart)
    if journal.trials:
        say(f"going on after {len(journal.trials)} trials of an earlier run")
    trials = TrialRunner(config, run.lmdeploy, leases, say)
    tools = Tools(run.planner.make, trials.run, say)
    result = tune(task._replace(earlier=earlier), journal, tools)
    if isinstance(result, signal.Signals):
        return result
    winner = result.winner
    if winner is not None and winner.outcome == "cut":
        say("not kept for later plans: only a part of the load was measured")
        return result
    try:
        if winner is not None:
            keep_tuned(result)
    except (OSError, UsageError) as exc:
        say(f"warning: the result is not kept: {exc}")
        return result
    journal.forget()
    return result


def _task(
    wanted: TuneRequest, request: PlanRequest, usual: Plan, lmdeploy: str,
    say: Callable[[str], None],
) -> TuneTask:  # fmt: skip
    """What there is to try, and under which load."""
    load = _load(wanted.load, usual)
    at_once = load.at_once or _at_once(usual)
    prefix = load.shared_prefix > 0 or load.trace is not None
    on_here = request.changed(on=usual.machine, gpus=None)
    mean = mean_request(load)
    found = choices(on_here, usual, mean, at_once, wanted.kv_types, prefix=prefix)
    waiting = waiting_words(wanted.load.concurrency or 0, usual.requests_at_once)
    if waiting:
        say(waiting)
    smaller = smaller_limit(on_here, usual, load, mean, at_once)
    if smaller is not None:
        say(str(smaller))
    say(
        f"{len(found)} settings keep the promise of the plan: at most {wanted.starts} starts and "
        f"{format_duration(wanted.seconds)}, each start for {described(load)}"
    )
    facts = {
        "model": identity(usual.model),
        "gpus": cards_of(usual.machine),
        "driver": str(usual.machine.driver),
        "lmdeploy": lmdeploy,
        "pretend": wanted.apart,
        "promise": promise_of(wanted.request.given()),
    }
    left = wanted.seconds - (time.monotonic() - wanted.began)
    goal = wanted.request.goal
    return TuneTask(found, load, at_once, goal, wanted.slo, left, wanted.starts, facts, None)


def _load(load: LoadSpec, usual: Plan) -> LoadSpec:
    """The load with what nobody said: as many requests at once as a batch may have, 30 s."""
    images = {} if usual.limits.vision_unit is not None else {"images": 0}
    window = {} if load.requests or load.trace or load.seconds else {"seconds": _SECONDS}
    loop = {}
    if load.rate is None and load.trace is None and load.concurrency is None:
        loop = {"concurrency": _at_once(usual)}
    return load.changed(**{**images, **load.given(), **window, **loop})


def described(load: LoadSpec) -> str:
    """A load in a few words, with its length."""
    if load.trace is not None:
        return f"the trace {load.trace}"
    seconds, requests = load.measured_seconds, load.requests
    length = f"{requests} requests" if seconds is None else format_duration(seconds)
    how = f"{load.at_once} at once" if load.rate is None else f"{load.rate:g} a second"
    return f"{length}, {how}, after {load.warm_up_requests} requests of warm-up"


def _at_once(usual: Plan) -> int:
    """Requests that show what a batch gives: twice what the plan runs, 128 at most."""
    running = usual.settings.max_batch_size * usual.parallel.replicas
    return max(1, min(_MOST_AT_ONCE, 2 * running))


def _tuned_before(task: TuneTask) -> list[Tuning]:
    """What is kept of this model, promise and load on these cards, of any LMDeploy."""
    facts = {name: value for name, value in task.facts.items() if name != "lmdeploy"}
    load = plain(task.load.given())
    return [
        one
        for one in recall_tuned(pretend=task.facts["pretend"])
        if all(getattr(one, name) == value for name, value in facts.items())
        and plain(one.load) == load
        and one.goal == task.goal
        and one.slo == task.slo
    ]


#: Seconds of each point of the curve.
_CURVE_SECONDS: Final = 8.0
_SHOWN: Final = 120


class TuneTask(NamedTuple):
    """What is tuned.

    ``facts`` are the fields of the result that are known before: of the model, machine and promise.
    ``time`` in seconds bounds all trials of all runs; None is no bound.
    """

    choices: Sequence[TrialChoice]
    load: LoadSpec
    at_once: int
    goal: Goal
    slo: dict[str, float]
    time: float | None
    starts: int
    facts: dict[str, Any]
    earlier: Tuning | None


class Tools(NamedTuple):
    """What a tuning works with.

    ``plan_of`` plans options again, on the machine as it is now; ``run`` starts a plan's engines
    and drives loads, for so many seconds at most; ``say`` takes lines of progress.
    """

    plan_of: Callable[[Options], Plan]
    run: Callable[[Plan, Sequence[LoadSpec], float | None], TrialEnd]
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic


class _Clock:
    """The time that is left of a tuning, of which earlier runs have spent some."""

    def __init__(self, task: TuneTask, journal: Journal, now: Callable[[], float]) -> None:
        self._now, self._journal = now, journal
        self._ends = None if task.time is None else now() + task.time - journal.seconds

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no limit."""
        return None if self._ends is None else self._ends - self._now()

    @property
    def over(self) -> bool:
        """Whether another trial, as long as those so far, would be cut short."""
        longest = max((one.seconds for one in self._journal.trials), default=0.0)
        return self.left is not None and self.left < longest

    def whole(self, what: str) -> Callable[[], Step]:
        """What the steps of a trial are a part of, with the time that is left."""

        def told() -> Step:
            left = self.left
            detail = "" if left is None else f"{format_duration(max(left, 0.0))} of --time left"
            return Step(what, detail=detail)

        return told


def tune(task: TuneTask, journal: Journal, tools: Tools) -> Tuning | signal.Signals:
    """Try, and keep the best; the signal where one ended it: the journal has all that was tried.

    A trial that was cut short is none of the journal's, and the best only where nothing else was
    measured.
    """
    search, stopped, clock = _resumed(task, journal), "", _Clock(task, journal, tools.clock)
    cut: TrialRecord | None = None
    while not stopped:
        stopped = _enough(task, journal, clock)
        index = None if stopped else search.next()
        if index is None:
            stopped = stopped or "no other settings promise more"
            break
        tried = _try(task, journal, index, tools, clock)
        if not isinstance(tried, TrialRecord):
            return tried
        if tried.outcome == "cut":
            cut, stopped = tried, f"the time is up: trial {tried.number} was ended"
            break
        journal.add(tried)
        search.tell(index, tried.measured)
    best = search.best()
    options = None if best is None else task.choices[best].options
    number = next((one.number for one in journal.trials if one.options == options), None)
    if number is None and cut is not None and cut.meets_slo:
        number = cut.number
    result = _result(task, (*journal.trials, *filter(None, (cut,))), number, stopped)
    if cut or result.winner is None or len(journal.trials) >= task.starts or clock.over:
        return result
    return _confirmed(task, result, tools, clock)


def _resumed(task: TuneTask, journal: Journal) -> TrialSearch:
    search = TrialSearch(
        [one.option for one in task.choices], task.slo, latency=task.goal == "latency",
        at_once=task.at_once,
    )  # fmt: skip
    for trial in journal.trials:
        for index, choice in enumerate(task.choices):
            if choice.options == trial.options:
                search.tell(index, trial.measured)
    return search


def _enough(task: TuneTask, journal: Journal, clock: _Clock) -> str:
    """Why nothing more is tried; empty while the search goes on."""
    # The last start confirms the best, and measures its curve.
    if len(journal.trials) >= max(1, task.starts - 1):
        return f"{len(journal.trials)} settings were tried"
    return "the time is up" if journal.trials and clock.over else ""


def _try(
    task: TuneTask, journal: Journal, index: int, tools: Tools, clock: _Clock
) -> TrialRecord | signal.Signals:
    choice, number = task.choices[index], len(journal.trials) + 1
    tools.say(f"trial {number}: {_told(choice)}")
    begun = tools.clock()
    try:
        plan = tools.plan_of(choice.options)
        if not plan.fits:
            end = TrialEnd((), "unserved", plan.verdict, None, 0.0)
        else:
            with part_of(clock.whole(f"trial {number} of at most {task.starts}")):
                end = tools.run(plan, [task.load], clock.left)
    except TurbofitError as exc:
        end = TrialEnd((), "unserved", exc.message, None, round(tools.clock() - begun, 1))
    if end.signal is not None:
        return end.signal
    trial = _record(task, choice, number, end)
    if trial.measured is None:
        tools.say(f"trial {number}: {trial.outcome}: {trial.why[:_SHOWN]}")
    else:
        keeps = "" if trial.meets_slo else ", which misses the SLO"
        part = f"; {trial.why}" if trial.outcome == "cut" else ""
        tools.say(
            f"trial {number}: {trial.measured.requests_per_second:.2f} requests/s, forecast "
            f"{trial.forecast.requests_per_second:.2f}{keeps}{part}"
        )
    return trial


def _told(choice: TrialChoice) -> str:
    plan, settings = choice.plan, choice.plan.settings
    kv = f", KV int{settings.quant_policy}" if settings.quant_policy else ""
    prefix = ", prefix caching" if settings.enable_prefix_caching else ""
    return (
        f"{plan.engine.name}, tp {plan.parallel.tp} x {plan.parallel.replicas}, batch "
        f"{settings.max_batch_size}, prefill {settings.max_prefill_token_num}{kv}{prefix}"
    )


def _record(task: TuneTask, choice: TrialChoice, number: int, end: TrialEnd) -> TrialRecord:
    plan, settings = choice.plan, choice.plan.settings
    told = end.outcome in ("measured", "cut") and end.results
    measured = figures_of(end.results[0]) if told else None
    return TrialRecord(
        number=number,
        options=choice.options,
        engine=plan.engine.name,
        tp=plan.parallel.tp,
        replicas=plan.parallel.replicas,
        max_batch_size=settings.max_batch_size,
        max_prefill_token_num=settings.max_prefill_token_num,
        quant_policy=settings.quant_policy,
        enable_prefix_caching=settings.enable_prefix_caching,
        kv_tokens=plan.kv.total_tokens,
        forecast=choice.option.forecast,
        outcome=end.outcome,
        why=end.why,
        measured=measured,
        meets_slo=measured is not None and meets(measured, task.slo),
        seconds=end.seconds,
    )


def _result(
    task: TuneTask, trials: tuple[TrialRecord, ...], best: int | None, stopped: str
) -> Tuning:
    result = Tuning(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        load=plain(task.load.given()),
        goal=task.goal,
        slo=task.slo,
        best=best,
        trials=trials,
        factors=_factors(trials),
        stopped=stopped,
        seconds=round(sum(one.seconds for one in trials), 1),
        **task.facts,
    )
    return replace(result, earlier=_earlier(result, task.earlier))


def _confirmed(
    task: TuneTask, result: Tuning, tools: Tools, clock: _Clock
) -> Tuning | signal.Signals:
    """Measure the best once more, and under other numbers of requests at once: the curve."""
    winner = result.winner
    assert winner is not None
    loads = _curve_loads(task)
    if not loads:
        return result
    tools.say(f"the best is trial {winner.number}: its curve")
    try:
        plan = tools.plan_of(dict(winner.options))
        if not plan.fits:
            return result
        with part_of(clock.whole("the curve of the best")):
            end = tools.run(plan, [load for _, load in loads], clock.left)
    except TurbofitError as exc:
        tools.say(f"no curve: {exc.message}")
        return result
    if end.signal is not None:
        return end.signal
    points = [
        CurvePoint(concurrency=at, measured=figures_of(one))
        for (at, _), one in zip(loads, end.results, strict=False)
        if not one.stopped
    ]
    if end.outcome != "measured":
        tools.say(f"the curve ends early: {end.why[:_SHOWN]}")
    return replace(result, curve=tuple(points), seconds=round(result.seconds + end.seconds, 1))


def _curve_loads(task: TuneTask) -> list[tuple[int, LoadSpec]]:
    """Closed loops of 1, 4, 16, … requests; none for an open loop or a trace."""
    if task.load.at_once is None:
        return []
    places = {4**power for power in range(8) if 4**power < task.at_once} | {task.at_once}
    seconds = min(_CURVE_SECONDS, task.load.measured_seconds or _CURVE_SECONDS)
    return [
        (at, task.load.changed(concurrency=at, seconds=seconds, requests=None, warm_up=at))
        for at in sorted(places)
    ]


def _factors(trials: Sequence[TrialRecord]) -> tuple[SpeedFactor, ...]:
    """Measured over forecast of each engine: the geometric mean of its trials."""
    logs: dict[str, list[float]] = {}
    for one in trials:
        whole = one.outcome == "measured"
        if whole and one.measured is not None and one.measured.requests_per_second > 0:
            ratio = one.measured.requests_per_second / one.forecast.requests_per_second
            logs.setdefault(one.engine, []).append(math.log(ratio))
    return tuple(
        SpeedFactor(
            engine=engine,
            factor=round(math.exp(sum(found) / len(found)), 4),
            trials=len(found),
        )
        for engine, found in sorted(logs.items())
    )


def _earlier(result: Tuning, before: Tuning | None) -> EarlierTuning | None:
    if before is None or before.winner is None or result.winner is None:
        return None
    then, now = before.winner.measured, result.winner.measured
    if then is None or now is None or then.requests_per_second <= 0:
        return None
    return EarlierTuning(
        lmdeploy=before.lmdeploy,
        created=before.created,
        requests_per_second=then.requests_per_second,
        change=round(now.requests_per_second / then.requests_per_second - 1, 4),
    )


# How far a tuning has come, on disk after every trial; of one model, promise, load and machine.


_SCHEMA: Final = "turbofit.tuning/1"


class _Pages(Struct):
    schema: Annotated[str, const(_SCHEMA)] = _SCHEMA
    seconds: float = 0.0
    trials: tuple[TrialRecord, ...] = ()


class Journal:
    """The trials so far, on pretend GPUs apart."""

    def __init__(self, key: str, *, pretend: bool) -> None:
        self._room, self._name = "tuning-pretend" if pretend else "tuning", f"{key}.json"
        pages = _Pages()
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            read = msgspec.json.decode(self._path(make=False).read_bytes(), type=_Pages)
            pages = read if read.schema == _SCHEMA else pages
        #: Seconds that earlier runs have spent.
        self.seconds, self.trials = pages.seconds, pages.trials

    def add(self, trial: TrialRecord) -> None:
        self.trials = (*self.trials, trial)
        self.seconds += trial.seconds
        # A folder that cannot be written costs what could be resumed, never the run.
        with suppress(OSError, UsageError):
            pages = _Pages(seconds=self.seconds, trials=self.trials)
            write_atomic(self._path(), to_json(pages), mode=0o600)

    def forget(self) -> None:
        with suppress(OSError):
            self._path(make=False).unlink()
        self.seconds, self.trials = 0.0, ()

    def _path(self, *, make: bool = True) -> Path:
        return state_dir(self._room, make=make) / self._name
