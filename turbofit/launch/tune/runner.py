"""One trial: the engines of a plan, started as `serve` starts them, under a load.

What an engine dies of is a result. When a trial ends, however it ends, so have its engines, its
gateway and its load.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from turbofit.core.errors import TurbofitError
from turbofit.core.process.progress import Step, tell
from turbofit.core.process.signals import unblock
from turbofit.core.process.variable_names import without_options
from turbofit.core.tuning import SpeedFigures
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.engine.engine_client import Timing
from turbofit.launch.engine.guard import guarded
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.run import Run
from turbofit.launch.serve.supervisor import StoppedError, StopSignal
from turbofit.load.result import LoadResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from turbofit.core.plan import Plan
    from turbofit.load.spec import LoadSpec

_HOST: Final = "127.0.0.1"
#: More than a load may have under way.
_QUEUE: Final = 4096
_BENCH: Final = (sys.executable, "-m", "turbofit", "bench")
#: Seconds between two tries to end a load.
_PATIENCE: Final = 10.0
_TIMING: Final = Timing(start=3600.0, drain=1.0, liveness=0.0, restarts=0)


Outcome = Literal["measured", "died", "unserved", "cut"]


class TrialEnd(NamedTuple):
    """How a trial ended: what its load measured, or why not.

    ``cut``: its time was over before its load was; the result is of a part of the load, or None.
    """

    result: LoadResult | None
    outcome: Outcome
    why: str
    seconds: float


def run_trial(common: Run, plan: Plan, load: LoadSpec, seconds: float | None = None) -> TrialEnd:
    """Start the plan's engines, drive the load, end the engines.

    ``common`` has what all trials have alike, but for the gateway. After so many seconds the trial
    is ended, whatever it does.

    Raises:
        StoppedError: a person's signal ended it.
    """
    begun, key = time.monotonic(), secrets.token_hex(16)
    outcome: Outcome = "unserved"
    why = ""
    stop = _TrialStop()
    drive = _Load(load, key, stop)
    gateway = GatewayConfig(
        host=_HOST, port=free_ports(1)[0], api_keys=(key,), queue_length=_QUEUE,
        queue_seconds=3600.0,
    )  # fmt: skip
    run = Run(
        common.config.changed(plan=plan, gateway=gateway, timing=_TIMING, access_log="none"),
        common.leases, common.say,
        on_open=drive.begin, on_tick=drive.look, on_death=drive.died, lmdeploy=common.lmdeploy,
    )  # fmt: skip
    run.plan = plan  # which is reserved
    run.begin()
    with stop, stop.within(seconds, drive.interrupt):
        try:
            run.follow(stop)
        except TurbofitError as exc:
            if not stop.late:
                outcome, why = "died", exc.message
        except StoppedError:  # the time was over while nothing ran yet
            pass
        finally:
            drive.end()
    if stop.heard is not None:
        raise StoppedError(stop.heard)
    result = drive.result if drive.result is not None and drive.result.answered else None
    whole = result is not None and not result.stopped
    if not why and drive.death:
        outcome, why = "died", drive.death
    elif not why and stop.late and not whole:
        outcome, why = "cut", "the time was over before its engine was ready"
        if result is not None:
            why = f"the time was over when {result.seconds:.0f} s were measured"
        elif drive.url:
            why = "the time was over before a measured request was answered"
    elif not why and result is not None:
        outcome = "measured"
    elif not why:
        why = drive.why
    return TrialEnd(result, outcome, why, round(time.monotonic() - begun, 1))


class _TrialStop(StopSignal):
    """A stop that tells a person's signal from the end of a load, and from the end of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: signal.Signals | None = None
        self.late = False

    @contextmanager
    def within(self, seconds: float | None, interrupt: Callable[[], bool]) -> Iterator[None]:
        """End what runs meanwhile when the time is over; inside the stop itself.

        ``interrupt`` ends what is measured; whether something is, and will end the run itself.
        """

        def over(_number: int, _frame: object) -> None:
            again, self.late = self.late, self.late or self.signal is None
            if self.signal is not None:
                return
            if self.abrupt:
                self.signal = signal.SIGTERM
                raise StoppedError(self.signal)
            if again or not interrupt():
                self.end()

        if seconds is None:
            yield
            return
        before = signal.signal(signal.SIGALRM, over)
        unblock((signal.SIGALRM,))
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), _PATIENCE)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """See :class:`StopSignal`; when the time is over, without a pause for the engines."""
        super().end(number)
        if self.late:
            self.strike()

    def _caught(self, number: int, frame: Any) -> None:
        if not self._swallowed:
            self.heard = signal.Signals(number)
        super()._caught(number, frame)


class _Load:
    """The load of a trial, `turbofit bench`, while its engines are supervised.

    In this process it would wait for the gateway's interpreter lock, and measure that.
    """

    def __init__(self, spec: LoadSpec, key: str, stop: StopSignal) -> None:
        self._spec, self._key, self._stop = spec, key, stop
        #: The gateway's, once it is open.
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.why = self.death = ""
        self.result: LoadResult | None = None

    def begin(self, urls: list[str]) -> None:
        self.url = urls[0]

    def died(self, why: str) -> None:
        """An engine ended: there is nothing more to measure."""
        self.death = self.death or why
        self._stop.end()

    def interrupt(self) -> bool:
        """End the load with what it has measured; whether it runs."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.send_signal(signal.SIGINT)
        return True

    def look(self) -> None:
        """Start the load once the gateway is open; after it the trial ends."""
        if self._process is None and self.url and not self.death:
            self._start()
        elif self._process is not None and self._process.poll() is not None:
            self._stop.end()

    def _start(self) -> None:
        tell(Step("the load"))
        try:
            self._process = subprocess.Popen(
                guarded([*_BENCH, self.url, "--json", *self._spec.option_arguments()]),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**without_options(os.environ), "TURBOFIT_API_KEY": self._key},
                start_new_session=True,  # Ctrl-C reaches turbofit alone, which ends this process
            )  # fmt: skip
        except OSError as exc:
            self.why = f"no load could be started: {exc}"
            self._stop.end()

    def end(self) -> None:
        """Stop the load where it runs, and take what it has measured."""
        if self._process is None:
            return
        self.interrupt()
        try:
            answer, _ = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            answer, _ = self._process.communicate()
        self.why = f"the load ended with {self._process.returncode}"
        with suppress(ValueError):
            document = json.loads(answer)
            if "error" in document:
                self.why = document["error"]["message"]
            else:
                self.result = msgspec.convert(document, LoadResult)
                self.why = self.result.stopped or "no request was answered"


def figures_of(result: LoadResult) -> SpeedFigures:
    """What a trial keeps of a load."""
    return SpeedFigures(
        requests_per_second=result.requests_per_second,
        output_tokens_per_second=result.output_tokens_per_second,
        ttft_p50=result.ttft.p50, ttft_p90=result.ttft.p90,
        tpot_p50=result.tpot.p50, tpot_p90=result.tpot.p90,
        e2e_p50=result.e2e.p50, e2e_p90=result.e2e.p90,
        answered=result.answered, failed=result.begun - result.answered,
    )  # fmt: skip
