"""`turbofit tune`: what there is to try under which load, the trials, and what is kept of them."""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.progress import Step, part_of
from turbofit.core.struct import Struct
from turbofit.core.tuning import CurvePoint, EarlierTuning, TrialRecord, Tuning
from turbofit.core.units import format_duration
from turbofit.core.version import __version__
from turbofit.launch.run import Run
from turbofit.launch.serve.runs import StateFile, waiting_words
from turbofit.launch.tune.runner import TrialEnd, figures_of, run_trial
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

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.tune.space import TrialChoice
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

#: Seconds that a trial measures, where nobody says.
_SECONDS: Final = 30.0
#: The most requests at once of a load that nobody described.
_MOST_AT_ONCE: Final = 128
#: Seconds of each point of the curve.
_CURVE_SECONDS: Final = 8.0
_SHOWN: Final = 120


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
) -> Tuning:
    """Try settings, and keep the best for later plans.

    ``config`` is of each trial; its request is planned here.

    Raises:
        StoppedError: a signal ended it; what was tried is kept.
    """
    run = Run(config, leases, say)
    run.plan = run.planner.make({})
    usual = run.refuse()
    if not usual.engine.of_lmdeploy:
        raise UsageError(
            f"{usual.model.name} is planned for Transformers: tune tries LMDeploy's settings",
            hint="turbofit serve serves it",
        )
    load = _load(wanted.load, usual)
    facts: dict[str, Any] = {
        "model": identity(usual.model),
        "gpus": cards_of(usual.machine),
        "driver": str(usual.machine.driver),
        "promise": promise_of(wanted.request.given()),
        "load": plain(load.given()),
        "goal": wanted.request.goal,
        "slo": wanted.slo,
    }
    lmdeploy = run.lmdeploy.version
    before = [
        one
        for one in recall_tuned(pretend=wanted.apart)
        if all(getattr(one, name) == value for name, value in facts.items())
    ]
    known = next((one for one in before if one.lmdeploy == lmdeploy), None)
    if known is not None and not wanted.again:
        say("tuned before: --again tries again, --forget drops it")
        return known
    assert config.request is not None
    on_here = config.request.changed(on=usual.machine, gpus=None)
    found, at_once = _choices(wanted, on_here, usual, load, say)
    key = tuned_key(*facts.values(), lmdeploy, wanted.apart)
    blank = Tuning(
        turbofit_version=__version__, created="", lmdeploy=lmdeploy, pretend=wanted.apart, **facts
    )
    tuner = Tuner(
        found, load, Journal(key, pretend=wanted.apart),
        run.planner.make, partial(run_trial, run), say,
        at_once=at_once, blank=blank, starts=wanted.starts,
        seconds=wanted.seconds - (time.monotonic() - wanted.began),
        earlier=next((one for one in before if one.lmdeploy != lmdeploy), None),
    )  # fmt: skip
    if tuner.journal.trials:
        say(f"going on after {len(tuner.journal.trials)} trials of an earlier run")
    result = tuner.tune()
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
    tuner.journal.forget()
    return result


def _choices(
    wanted: TuneRequest, request: PlanRequest, usual: Plan, load: LoadSpec,
    say: Callable[[str], None],
) -> tuple[list[TrialChoice], int]:  # fmt: skip
    """What there is to try, and the requests under way; what people should know is said."""
    at_once = load.at_once or _at_once(usual)
    prefix = load.shared_prefix > 0 or load.trace is not None
    mean = mean_request(load)
    found = choices(request, usual, mean, at_once, wanted.kv_types, prefix=prefix)
    waiting = waiting_words(wanted.load.concurrency or 0, usual.requests_at_once)
    if waiting:
        say(waiting)
    smaller = smaller_limit(request, usual, load, mean, at_once)
    if smaller:
        say(smaller)
    say(
        f"{len(found)} settings keep the promise of the plan: at most {wanted.starts} starts and "
        f"{format_duration(wanted.seconds)}, each start for {described(load)}"
    )
    return found, at_once


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


@dataclass
class Tuner:
    """Tries choices under a load, and keeps the best.

    ``plan_of`` plans options again, on the machine as it is now; ``run`` starts a plan's engines
    and drives loads, for so many seconds at most. ``at_once`` are the requests under way;
    ``seconds`` are those of all trials of all runs, None without a bound. ``blank`` is the result
    with what is known before. ``earlier`` is what was tuned with another LMDeploy.
    """

    choices: Sequence[TrialChoice]
    load: LoadSpec
    journal: Journal
    plan_of: Callable[[Options], Plan]
    run: Callable[[Plan, Sequence[LoadSpec], float | None], TrialEnd]
    say: Callable[[str], None]
    _: KW_ONLY
    at_once: int
    blank: Tuning
    starts: int
    seconds: float | None
    earlier: Tuning | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        spent = self.journal.seconds
        self._ends = None if self.seconds is None else self.clock() + self.seconds - spent

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no limit."""
        return None if self._ends is None else self._ends - self.clock()

    @property
    def over(self) -> bool:
        """Whether another trial, as long as those so far, would be cut short."""
        longest = max((one.seconds for one in self.journal.trials), default=0.0)
        return self.left is not None and self.left < longest

    def tune(self) -> Tuning:
        """Try, and keep the best.

        A trial that was cut short is none of the journal's, and the best only where nothing else
        was measured.

        Raises:
            StoppedError: a signal ended it: the journal has all that was tried.
        """
        search = self._resumed()
        cut: TrialRecord | None = None
        while not (stopped := self._enough()):
            index = search.next()
            if index is None:
                stopped = "no other settings promise more"
                break
            trial = self._try(self.choices[index])
            if trial.outcome == "cut":
                cut, stopped = trial, f"the time is up: trial {trial.number} was ended"
                break
            self.journal.add(trial)
            search.tell(index, trial.measured)
        best = search.best()
        options = None if best is None else self.choices[best].options
        number = next((one.number for one in self.journal.trials if one.options == options), None)
        if number is None and cut is not None and cut.meets_slo:
            number = cut.number
        result = self._result((*self.journal.trials, *filter(None, (cut,))), number, stopped)
        tried = len(self.journal.trials)
        if cut or result.winner is None or tried >= self.starts or self.over:
            return result
        return self._confirmed(result, result.winner)

    def _resumed(self) -> TrialSearch:
        search = TrialSearch(
            [one.option for one in self.choices], self.blank.slo,
            latency=self.blank.goal == "latency", at_once=self.at_once,
        )  # fmt: skip
        for trial in self.journal.trials:
            for index, choice in enumerate(self.choices):
                if choice.options == trial.options:
                    search.tell(index, trial.measured)
        return search

    def _enough(self) -> str:
        """Why nothing more is tried; empty while the search goes on."""
        trials = self.journal.trials
        # The last start confirms the best, and measures its curve.
        if len(trials) >= max(1, self.starts - 1):
            return f"{len(trials)} settings were tried"
        return "the time is up" if trials and self.over else ""

    def _ended(self, options: Options, loads: Sequence[LoadSpec], what: str) -> TrialEnd:
        """How a start with these options ends under loads, the first of which is told."""

        def whole() -> Step:
            left = self.left
            detail = "" if left is None else f"{format_duration(max(left, 0.0))} of --time left"
            return Step(what, detail=detail)

        begun = self.clock()
        try:
            plan = self.plan_of(options)
            if not plan.fits:
                return TrialEnd((), "unserved", plan.verdict, 0.0)
            with part_of(whole):
                return self.run(plan, loads, self.left)
        except TurbofitError as exc:
            return TrialEnd((), "unserved", exc.message, round(self.clock() - begun, 1))

    def _try(self, choice: TrialChoice) -> TrialRecord:
        number = len(self.journal.trials) + 1
        self.say(f"trial {number}: {_told(choice)}")
        what = f"trial {number} of at most {self.starts}"
        trial = self._record(choice, number, self._ended(choice.options, [self.load], what))
        if trial.measured is None:
            self.say(f"trial {number}: {trial.outcome}: {trial.why[:_SHOWN]}")
        else:
            keeps = "" if trial.meets_slo else ", which misses the SLO"
            part = f"; {trial.why}" if trial.outcome == "cut" else ""
            self.say(
                f"trial {number}: {trial.measured.requests_per_second:.2f} requests/s, forecast "
                f"{trial.forecast.requests_per_second:.2f}{keeps}{part}"
            )
        return trial

    def _record(self, choice: TrialChoice, number: int, end: TrialEnd) -> TrialRecord:
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
            meets_slo=measured is not None and meets(measured, self.blank.slo),
            seconds=end.seconds,
        )

    def _result(self, trials: tuple[TrialRecord, ...], best: int | None, stopped: str) -> Tuning:
        result = replace(
            self.blank,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            best=best,
            trials=trials,
            stopped=stopped,
            seconds=round(sum(one.seconds for one in trials), 1),
        )
        return replace(result, earlier=_earlier(result, self.earlier))

    def _confirmed(self, result: Tuning, winner: TrialRecord) -> Tuning:
        """Measure the best once more, and under other numbers of requests at once: the curve."""
        loads = self._curve_loads()
        if not loads:
            return result
        self.say(f"the best is trial {winner.number}: its curve")
        end = self._ended(dict(winner.options), list(loads.values()), "the curve of the best")
        if end.outcome != "measured":
            self.say(f"the curve ends early: {end.why[:_SHOWN]}")
        points = tuple(
            CurvePoint(concurrency=at, measured=figures_of(one))
            for at, one in zip(loads, end.results, strict=False)
            if not one.stopped
        )
        return replace(result, curve=points, seconds=round(result.seconds + end.seconds, 1))

    def _curve_loads(self) -> dict[int, LoadSpec]:
        """Closed loops of 1, 4, 16, … requests; none for an open loop or a trace."""
        if self.load.at_once is None:
            return {}
        places = {4**power for power in range(8) if 4**power < self.at_once} | {self.at_once}
        seconds = min(_CURVE_SECONDS, self.load.measured_seconds or _CURVE_SECONDS)
        return {
            at: self.load.changed(concurrency=at, seconds=seconds, requests=None, warm_up=at)
            for at in sorted(places)
        }


def _told(choice: TrialChoice) -> str:
    plan, settings = choice.plan, choice.plan.settings
    kv = f", KV int{settings.quant_policy}" if settings.quant_policy else ""
    prefix = ", prefix caching" if settings.enable_prefix_caching else ""
    return (
        f"{plan.engine.name}, tp {plan.parallel.tp} x {plan.parallel.replicas}, batch "
        f"{settings.max_batch_size}, prefill {settings.max_prefill_token_num}{kv}{prefix}"
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


class _Pages(Struct, tag_field="schema", tag="turbofit.tuning/1"):
    seconds: float = 0.0
    trials: tuple[TrialRecord, ...] = ()


class Journal:
    """The trials so far, on pretend GPUs apart; ``seconds`` are what they have taken."""

    def __init__(self, key: str, *, pretend: bool) -> None:
        self._file = StateFile("tuning-pretend" if pretend else "tuning", key, _Pages)
        pages = self._file.read() or _Pages()
        self.seconds, self.trials = pages.seconds, pages.trials

    def add(self, trial: TrialRecord) -> None:
        self.trials = (*self.trials, trial)
        self.seconds += trial.seconds
        self._file.write(_Pages(seconds=self.seconds, trials=self.trials))

    def forget(self) -> None:
        self._file.forget()
        self.seconds, self.trials = 0.0, ()
