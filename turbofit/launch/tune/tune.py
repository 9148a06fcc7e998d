"""`turbofit tune`: what there is to try under which load, the trials, and what is kept of them."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.units import format_duration
from turbofit.launch.run import Run
from turbofit.launch.serve.runs import waiting_words
from turbofit.launch.tune.forecast import mean_request, smaller_limit
from turbofit.launch.tune.runner import TrialRunner
from turbofit.launch.tune.space import choices
from turbofit.launch.tune.tuning import Journal, Tools, TuneTask, tune
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
    from collections.abc import Callable

    from turbofit.core.plan import Plan
    from turbofit.core.tuning import Tuning
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest

__all__ = ["TuneRequest", "described", "tune_model"]

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

    Args:
        wanted: what is tuned.
        config: of each trial; its request is planned here.
        leases: the machine's reservations.
        say: takes lines of progress.
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
