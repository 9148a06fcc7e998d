"""Runs one trial: starts the engines of a plan as `serve` does, and drives a load.

When a trial ends, for any reason, its engines, gateway and load have ended.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.process.network import LOOPBACK
from turbofit.core.process.progress import Step, tell
from turbofit.core.process.signals import StoppedError, StopSignal
from turbofit.core.process.variables import without_options
from turbofit.core.tuning import SpeedFigures
from turbofit.core.units import parse_seconds
from turbofit.gateway.config import GatewayConfig
from turbofit.measure.load.result import LoadResult
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.process.child import child
from turbofit.serving.run import Run
from turbofit.serving.start import follow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from turbofit.core.plan import Plan
    from turbofit.measure.load.spec import LoadSpec
    from turbofit.measure.tune_space import LoadForecast, TrialChoice

#: The times that an SLO can limit, each with the measured figure that must not exceed the limit.
LIMITS: Final = {"ttft": "ttft_p90", "tpot": "tpot_p90", "e2e": "e2e_p90"}
#: The largest share of requests that may fail.
_FAILING: Final = 0.01
#: The length of the gateway's queue: more requests than a load may have under way.
_QUEUE: Final = 4096
_BENCH: Final = (sys.executable, "-m", "turbofit", "bench")
#: Seconds to wait for a load's end after SIGINT; then the load is killed.
_PATIENCE: Final = 10.0
_TIMING: Final = Timing(start=3600.0, drain=1.0, liveness=0.0, restarts=0)
Outcome = Literal["measured", "started", "died", "unserved"]


def parse_slo(text: str) -> dict[str, float]:
    """Read an SLO; return the seconds by the name of each limit.

    Raises:
        UsageError: an entry is no limit, or stands twice.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign or name not in LIMITS or name in limits:
            raise UsageError(
                f"--slo {part.strip()!r} is no limit, or stands twice",
                hint="write it as ttft=2s,tpot=50ms,e2e=20s",
            )
        limits[name] = parse_seconds(value, f"--slo {name}")
    return limits


def meets(figures: SpeedFigures, slo: Mapping[str, float]) -> bool:
    """Return whether figures keep all limits, and nearly all requests were answered."""
    requests = figures.answered + figures.failed
    if not figures.answered or figures.failed > _FAILING * requests:
        return False
    return all(getattr(figures, LIMITS[name]) <= limit for name, limit in slo.items())


def order(
    left: Sequence[TrialChoice],
    measured: tuple[LoadForecast, SpeedFigures] | None,
    slo: Mapping[str, float],
    at_once: int,
) -> list[TrialChoice]:
    """Sort the remaining choices, the most promising first.

    First come the choices that keep the SLO by their forecast, the most requests a second first.
    Then come the others, the least excess over the SLO first. ``measured``: a trial's forecast and
    its figures; the ratios of their times correct all forecasts.
    """

    def times(forecast: LoadForecast) -> dict[str, float]:
        e2e = at_once / max(forecast.requests_per_second, 1e-9)
        return {"ttft": forecast.ttft, "tpot": forecast.tpot, "e2e": e2e}

    factors = dict.fromkeys(LIMITS, 1.0)
    if measured is not None:
        forecast = times(measured[0])
        factors = {
            name: getattr(measured[1], figure) / max(forecast[name], 1e-6)
            for name, figure in LIMITS.items()
        }

    def promise(choice: TrialChoice) -> tuple[float, float]:
        seconds = times(choice.forecast)
        shares = (seconds[name] * factors[name] / limit for name, limit in slo.items())
        return -max(1.0, max(shares, default=0.0)), choice.rate

    return sorted(left, key=promise, reverse=True)


class TrialEnd(NamedTuple):
    """How a trial ended: the figures of its load, or the reason why it has no figures."""

    measured: SpeedFigures | None
    outcome: Outcome
    why: str = ""


#: A generator that yields loads for one server, and receives how each load ended.
Loads = Generator["LoadSpec", TrialEnd, None]


def run_trial(common: Run, plan: Plan, load: LoadSpec) -> TrialEnd:
    """Start the plan's engines, drive the load, end the engines; return the load's figures.

    ``common``: a run with the configuration and the leases of all trials; its gateway is not used.

    Raises:
        StoppedError: a person's signal ended the trial.
    """

    def once() -> Loads:
        yield load

    return run_loads(common, plan, once())


def run_loads(common: Run, plan: Plan, loads: Loads) -> TrialEnd:
    """Start the plan's engines, drive one load after another, and end the engines.

    Return how the last load ended. ``common``: see `run_trial`.

    Raises:
        StoppedError: a person's signal ended the loads.
    """
    key, stop = secrets.token_hex(16), StopSignal()
    drive = _Load(loads, key, stop)
    gateway = GatewayConfig(
        host=LOOPBACK, port=0, api_key=(key,), queue_length=_QUEUE,
        queue_seconds=3600.0,
    )  # fmt: skip
    run = Run(
        common.config.changed(plan=plan, gateway=gateway, timing=_TIMING, access_log="none"),
        common.leases, common.say,
        on_open=drive.begin, on_tick=drive.look, on_death=drive.died, lmdeploy=common.lmdeploy,
    )  # fmt: skip
    run.plan = plan  # the plan's memory is reserved already
    run.starts_trials = False
    run.begin()
    with stop:
        try:
            follow(run, stop)
        except TurbofitError as exc:
            drive.died(exc.message)
        finally:
            drive.end()
    if stop.received is not None:
        raise StoppedError(stop.received)
    return TrialEnd(None, "died", drive.death) if drive.death else drive.last


class _Load:
    """The loads of a trial, each a process of `turbofit bench` while the engines are supervised.

    In this process a load and the gateway would wait for each other's interpreter lock.
    """

    def __init__(self, loads: Loads, key: str, stop: StopSignal) -> None:
        self._loads, self._key, self._stop = loads, key, stop
        self._process: subprocess.Popen[bytes] | None = None
        self._url = self.death = ""
        self.result: LoadResult | None = None
        self.last = TrialEnd(None, "unserved", "no load began")

    def died(self, why: str) -> None:
        """Note why the load cannot be measured: an engine ended, or no engine started."""
        self.death = self.death or why
        self._stop.end()

    def look(self) -> None:
        """Begin the next load if one has ended; end the engines after the last."""
        if self._process is not None and self._process.poll() is not None:
            self.end()
            self._next(lambda: self._loads.send(self.last))

    def begin(self, urls: list[str]) -> None:
        """Start the first load, once the gateway is open."""
        self._url = urls[0]
        if not self.death:
            self._next(lambda: next(self._loads))

    def _next(self, choose: Callable[[], LoadSpec]) -> None:
        """Start the load that ``choose`` returns; end the engines if there is no further load."""
        tell(Step("the load"))
        try:
            words = [*_BENCH, self._url, "--json", *choose().option_arguments()]
            env = {**without_options(os.environ), "TURBOFIT_API_KEY": self._key}
            self._process = child(words, env, stderr=subprocess.DEVNULL)
        except StopIteration:
            self._stop.end()
        except OSError as exc:
            self.last = TrialEnd(None, "unserved", f"no load could be started: {exc}")
            self._stop.end()

    def end(self) -> None:
        """Stop the load if it runs, and read its results."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            answer, _ = process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            answer, _ = process.communicate()
        self.result, why = None, f"the load ended with {process.returncode}"
        with suppress(ValueError):
            document = json.loads(answer)
            if "error" in document:
                why = document["error"]["message"]
            else:
                self.result = msgspec.convert(document, LoadResult)
                why = self.result.stopped or "no request was answered"
        self.last = TrialEnd(None, "unserved", why)
        if self.result is not None and self.result.answered:
            self.last = TrialEnd(figures_of(self.result), "measured")


def figures_of(result: LoadResult) -> SpeedFigures:
    return SpeedFigures(
        requests_per_second=result.requests_per_second,
        output_tokens_per_second=result.output_tokens_per_second,
        ttft_p50=result.ttft.p50, ttft_p90=result.ttft.p90,
        tpot_p50=result.tpot.p50, tpot_p90=result.tpot.p90,
        e2e_p50=result.e2e.p50, e2e_p90=result.e2e.p90,
        answered=result.answered, failed=result.begun - result.answered,
        ttft_p99=result.ttft.p99, tpot_p99=result.tpot.p99, turns=result.turns,
    )  # fmt: skip
