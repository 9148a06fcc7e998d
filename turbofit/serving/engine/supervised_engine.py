"""One engine through all its starts: process, log, readiness, liveness, restarts."""

from __future__ import annotations

import time
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal, Protocol

from turbofit.core.engine_end import End, EndKind
from turbofit.core.process.log import LazyLogger
from turbofit.core.process.network import LOOPBACK
from turbofit.core.units import doubled
from turbofit.logs.death import Exit
from turbofit.machine.host import host_kills
from turbofit.serving.engine.engine_client import EngineClient, Probe, Timing
from turbofit.serving.engine.engine_log import (
    StartupTracker,
    fallback_end,
    silence_words,
    stalled_end,
)
from turbofit.serving.engine.process import EngineProcess
from turbofit.serving.engine.worst_requests import seconds_of, whole_check
from turbofit.serving.gpu_monitor import any_busy
from turbofit.serving.process.child import processor_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from turbofit.core.plan import EnginePlan, Plan
    from turbofit.gateway.routing.engines import Outage, RoutedEngine
    from turbofit.rehearsal.pretend.clock import ClockFile
    from turbofit.serving.engine.launches import Launch
    from turbofit.serving.engine.pretend_launch import PretendReader
    from turbofit.serving.engine.worst_requests import ProbeRequest

    Owing = Probe | RoutedEngine
    AskWorstCases = Callable[["SupervisedEngine", str, Callable[[ProbeRequest], int]], None]

#: The longest request may take this many times its forecast (measured: 1.3 times).
_FORECASTS: Final = 4
#: The share of a processor above which a process counts as working. An idle LMDeploy takes a
#: hundredth of a processor.
_SHARE: Final = 0.05
#: Shares of `Timing.silence`: how long an answer is late before the first observation, the time
#: between two observations, and how long an engine does nothing before it is doubtful.
_FIRST, _EVERY, _DOUBT = 0.25, 0.1, 0.5
_LOG: Final = LazyLogger(__name__)

#: Seconds between two readings of how many processes the kernel killed for lack of memory.
_COUNT_SECONDS: Final = 30.0
#: Seconds for one completion; the server of a dead engine refuses a completion immediately.
_CONFIRM_SECONDS: Final = 2.0
EngineState = Literal["waiting", "starting", "ready", "broken"]
#: For each state of an engine: the next states, and who moves the engine to each of them. A ready
#: engine without a sign of life stays ready, and its clients go elsewhere (`Supervision.on_doubt`).
#: With `--idle`, sleeping engines have no supervisor (`gateway.idle.State`).
NEXT_STATES: Final[dict[EngineState, dict[EngineState, str]]] = {
    "waiting": {"starting": "the supervisor, at `again_at`, when no process is left"},
    "starting": {
        "ready": "the engine's own look, after an answer to its probe",
        "waiting": "the supervisor, after an end that another start may mend, or if an engine that "
        "had served cannot be started now",
        "broken": "the supervisor, after more than `Timing.restarts` ends in `Timing.window`",
    },
    "ready": {"waiting": "as from starting", "broken": "as from starting"},
    "broken": {"starting": "the supervisor, at `again_at`, when no process is left"},
}


class Silence:
    """Measures for how long one start of an engine has given no sign of life.

    ``group`` is the engine's process group. ``pretend``: the GPUs are not real. ``clock`` has the
    time until which pretend GPUs work.
    """

    def __init__(
        self,
        plan: Plan,
        engine: EnginePlan,
        timing: Timing,
        group: int,
        *,
        pretend: bool,
        clock: ClockFile | None = None,
    ) -> None:
        self._plan, self._engine, self._timing = plan, engine, timing
        self._group, self._clock = group, clock
        #: The real GPUs whose work is a sign of life; empty on pretend GPUs.
        self._uuids = () if pretend else tuple(ledger.uuid for ledger in engine.ledgers)
        #: The times of the engine's last sign of life and of the last observation, and the
        #: processor seconds at the last observation.
        self._worked_at = self._observed_at = float("-inf")
        self._used = 0.0
        #: The factor by which pretend GPUs are slower than the forecast.
        self._slower = 1.0
        #: The time of the last look, and of the last look after a long time without looks.
        self._seen_at, self._awake_at = float("inf"), float("-inf")
        #: The time at which an engine without a sign of life counts as hung.
        self.ends_at = float("inf")

    def look(
        self, now: float, ready_at: float, owing: Sequence[Owing]
    ) -> Literal["answers", "works", "doubtful", "hung"]:
        """Judge whether the engine lives, by the answers that it owes and by signs of its work.

        Time before ``ready_at`` does not make an answer late. Return:

        - "answers" if no answer is late;
        - "works" if an answer is late and the engine computes;
        - "doubtful" if the engine has done nothing for a while;
        - "hung" if the engine must be ended.
        """
        most = self._timing.silence
        # After a long time without looks, for example of a suspended machine, silence begins anew.
        if now - self._seen_at >= _FIRST * most:
            self._awake_at = now
        self._seen_at = now
        asked = [debtor.asked_at for debtor in owing if debtor.owes]
        bytes_at = [debtor.last_byte_at for debtor in owing]
        silent_since = max(ready_at, self._awake_at, min(asked, default=now), *bytes_at)
        if not asked or now - silent_since < _FIRST * most:
            self._observed_at = float("-inf")
            return "answers"
        if now - self._observed_at >= _EVERY * most:
            self._observe(now)
        idle_since = max(silent_since, self._worked_at)
        self.ends_at = idle_since + most
        if now >= self.ends_at or now - silent_since >= self._slower * self._longest:
            return "hung"
        return "doubtful" if now - idle_since >= _DOUBT * most else "works"

    def _observe(self, now: float) -> None:
        """Look for work of the engine's processes and GPUs since the last observation."""
        used = processor_seconds(self._group)
        works = used - self._used > _SHARE * (now - self._observed_at)
        self._observed_at, self._used = now, used
        if works or (self._uuids and any_busy(self._uuids) is not False):
            self._worked_at = now
        if self._clock is not None:  # a pretend GPU's work takes no processor time
            reading = self._clock.read()
            self._worked_at = max(self._worked_at, min(now, reading.until))
            self._slower = max(1.0, reading.factor)

    @cached_property
    def _longest(self) -> float:
        """Seconds without a byte after which an engine that computes counts as hung."""
        forecast = seconds_of(self._plan, self._engine, whole_check(self._plan, self._engine, ""))
        return max(self._timing.longest_silence, _FORECASTS * forecast)


class Examiner(Protocol):
    """Sends engines more requests than a usual start, before the engines count as ready."""

    def begin(self, plan: Plan) -> None:
        """Prepare for the start of this plan's engines."""

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        """Send requests to a healthy engine by ``ask``, in the probe's thread.

        Raises:
            LaunchError: the engine must not become ready.
        """


@dataclass(frozen=True)
class Supervision:
    """Settings of a supervisor, and functions that the supervisor calls.

    ``worst_cases`` sends an engine worst-case requests before the engine is ready. ``before_start``
    is called before each start of an engine, and may raise a `TurbofitError`. ``clients`` returns
    the gateway's clients of the engine with this index, None if no gateway serves. The supervisor
    calls:

    - ``on_end`` when an engine ends that had served, or that will be started again;
    - ``on_back`` when an engine is ready again while the server is open;
    - ``on_doubt``, with an engine's index and the time at which the engine will be ended, when the
      engine gives no sign of life;
    - ``on_rest`` when all engines rest, and with None when an engine is started again.
    """

    say: Callable[[str], None]
    worst_cases: AskWorstCases | None = None
    timing: Timing = field(default_factory=Timing)
    _: KW_ONLY
    clock: Callable[[], float] = time.monotonic
    before_start: Callable[[], object] = lambda: None
    clients: Callable[[int], Owing | None] = lambda _index: None
    on_end: Callable[[SupervisedEngine, End], None] = lambda _engine, _end: None
    on_back: Callable[[SupervisedEngine], None] = lambda _engine: None
    on_doubt: Callable[[int, float], None] = lambda _index, _ends_at: None
    on_rest: Callable[[Outage | None], None] = lambda _outage: None


class SupervisedEngine:
    """The engine of one group through all its starts; the log is a file in ``folder``.

    ``index`` is the engine's place among the engines of the supervisor.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        plan: Plan,
        launch: Launch,
        folder: Path,
        tell: Callable[[str], None],
        supervision: Supervision,
        *,
        index: int = 0,
        name: str = "engine",
    ) -> None:
        """Prepare the engine; `start` starts its process."""
        # Given, the same through all starts.
        self.plan, self.launch, self._tell, self.name = plan, launch, tell, name
        self._supervision, self.index = supervision, index
        self._timing, self._clock = supervision.timing, supervision.clock
        self.log = folder / f"engine-{launch.group}.log"
        self.url = f"http://{LOOPBACK}:{launch.port}"
        self.client = EngineClient(launch.port, launch.key)

        # Where the engine is among its starts.
        self.state: EngineState = "waiting"
        #: The number of starts so far.
        self.starts = 0
        #: The time of the next start of an engine that waits or rests.
        self.again_at = 0.0
        #: Whether the engine has been ready in any start.
        self.was_ready = False
        #: The times of the ends within `Timing.window`.
        self._ends: list[float] = []

        # Of the present process; `start` makes them anew.
        self.process: EngineProcess | None = None
        #: Reads the memory in use on pretend GPUs; None on real GPUs.
        self.pretended: PretendReader | None = None
        #: The clock of pretend GPUs; None on real GPUs, and if forwards take no time.
        self.clock: ClockFile | None = None
        self.tracker = StartupTracker(plan, self.planned, self.log)
        self._probe: Probe | None = None
        #: The silence of the present start.
        self.silence: Silence | None = None

        # Learned of the present process, by `look`.
        #: The time at which the engine became ready.
        self._ready_at = 0.0
        #: The time of the engine's end that `on_doubt` got last.
        self._doubted = float("inf")
        #: The times of the start, of the last count of kills, and of the engine's last output.
        self._began = self._counted = self._heard = 0.0
        #: The kernel's count of killed processes, at the last two readings.
        self._kills: tuple[int | None, int | None] = (None, None)
        #: Whether the present silence of a starting engine has been explained.
        self._silence_told = False

    @property
    def group(self) -> int:
        return self.launch.group

    @property
    def planned(self) -> EnginePlan:
        """The engine's part of the plan."""
        return self.plan.engines[self.group]

    @property
    def clients(self) -> Owing | None:
        """The gateway's clients of this engine; None if no gateway serves."""
        return self._supervision.clients(self.index)

    def start(self) -> None:
        """Start the engine, in the main thread.

        Raises:
            OSError, TurbofitError: the engine cannot be started.
        """
        self._move("starting")
        self._supervision.before_start()
        start_command = self.launch.start_command(self.starts)
        self.starts += 1
        if start_command.machine is not None:
            from turbofit.serving.engine.pretend_launch import PretendReader

            self.pretended = PretendReader(self.plan, self.group, start_command.machine)
        self.clock = start_command.clock
        self._began = self._counted = self._heard = self._clock()
        self._kills = (host_kills(),) * 2
        self.tracker = StartupTracker(self.plan, self.planned, self.log, self._began)
        # On a full disk, a restart has no log, but the engine starts.
        self.process = EngineProcess(
            start_command.argv, start_command.env, self.log, self.launch.spawn,
            log_required=self.starts == 1,
        )  # fmt: skip
        error = self.process.log_error
        log = f"no log, {self.log}: {error}" if error else f"log {self.log}"
        self._tell(f"phase: starting (process {self.process.pid}, {log})")
        # No worst cases after a restart: beside clients' requests, these would exceed the plan.
        worst_cases = self._supervision.worst_cases
        asks = None if worst_cases is None or self.was_ready else partial(worst_cases, self)
        self.silence = Silence(
            self.plan,
            self.planned,
            self._timing,
            self.process.pid,
            pretend=self.pretended is not None,
            clock=self.clock,
        )
        self._probe = Probe(
            self.client, self._timing, asks, serial=self.plan.backend.serial, clock=self._clock
        )
        self._probe.start()

    def look(self, now: float, *, last: bool = False) -> End | None:
        """Read the log's new lines; return the end of an engine that has ended or must be ended.

        ``last``: no later look follows, so the look does not wait for the log's reason of the end.
        """
        process, probe = self.process, self._probe
        if process is None or probe is None:
            return None
        code = process.poll()
        self._read(process, code, now)
        # If the engine's loop has failed, this failure is the cause, and not a later exit code.
        if code is not None and not self.tracker.failing:
            return self._explained_end(code)
        if self.tracker.fallback:
            return fallback_end(self.tracker)
        if code is not None or self.tracker.loop_failed(now) or (last and self.tracker.failing):
            return self._loop_ended(code)
        return self._end_of_running(probe, now)

    def _read(self, process: EngineProcess, code: int | None, now: float) -> None:
        """Read the engine's new output, and update its phase."""
        lines = process.take() if code is None else process.finish()
        if code is None:
            # Errors that the engine has survived do not explain a later end. Two readings of kills
            # are kept, since the kernel may report a kill seconds late.
            if self._probe is not None:
                self.tracker.survived(self._probe.lived)
            if now - self._counted >= _COUNT_SECONDS:
                self._kills, self._counted = (self._kills[1], host_kills()), now
        self._listen(bool(lines), now)
        for text, count in lines:
            for line in self.tracker.see(text, count, now):
                self._tell(line)
        self._follow(now)

    def _loop_ended(self, code: int | None) -> End | None:
        """Return the end of an engine whose loop failed; None if the engine still answers."""
        if code is None and self.state == "ready" and self.client.completes(_CONFIRM_SECONDS):
            # Since the engine answers, the line about a failed loop is of another program.
            self.tracker.survived(float("inf"))
            return None
        return self._explained_end(None)

    def _end_of_running(self, probe: Probe, now: float) -> End | None:
        """Return an end for a running engine that cannot serve; None if the engine is well."""
        if self.tracker.hangs(now):
            return self.tracker.death()
        # A loop that ends fails its requests first (`error`), and logs the reason later.
        if probe.error is not None and not self.tracker.failing:
            hint = f"{probe.error.hint} ({self.log})"
            kind: EndKind = "crash" if self.was_ready else "refused"
            return End(kind=kind, message=probe.error.message, hint=hint)
        if self.state == "starting" and now - self._began > self._timing.start:
            hours = self._timing.start / 3600
            return stalled_end(f"the engine was not ready after {hours:.2g} hours", self.log)
        if probe.unanswered:
            return stalled_end("the engine lives but answers no completion", self.log)
        return self._end_of_hanging(probe, now)

    def _end_of_hanging(self, probe: Probe, now: float) -> End | None:
        """Return an end for a hanging engine; None if the engine is well or slow (`Silence`)."""
        silence, clients = self.silence, self.clients
        if silence is None or not self._timing.liveness:
            return None
        if self.state != "ready":
            # Nothing is owed before the engine listens, during worst cases, and before a restart.
            if self.state != "starting" or not probe.owes:
                return None
            clients = None
        state = silence.look(now, self._ready_at, [probe, clients] if clients else [probe])
        if state == "doubtful" and clients and self._doubted != silence.ends_at:
            self._doubted = silence.ends_at
            self._supervision.on_doubt(self.index, silence.ends_at)
        if state == "hung":
            return stalled_end(
                "the engine hangs: it owes answers and gives no sign of life", self.log
            )
        return None

    def end(self, seconds: float) -> bool:
        """Kill the engine's remaining processes; return whether they ended within ``seconds``.

        If a process has not ended, `process` stays set, and the memory stays in use.
        """
        self.stop_probe()
        if self.process is not None and self.process.kill(seconds):
            self.process.finish(0.5)
            self.process = None
        return self.process is None

    def stop_probe(self) -> None:
        """Stop asking the engine."""
        if self._probe is not None:
            self._probe.stop()

    def schedule_restart(self, now: float) -> float | None:
        """Schedule the next start; return the pause in seconds, or None after too many ends."""
        timing = self._timing
        self._ends = [*(end for end in self._ends if now - end < timing.window), now]
        ends = len(self._ends)
        if ends > timing.restarts:
            self._move("broken")
            self.again_at = now + timing.window
            return None
        pause = doubled(timing.backoff, ends - 1, timing.longest_backoff)
        self._move("waiting")
        self.again_at = now + pause
        return pause

    def _move(self, state: EngineState) -> None:
        """Move the engine to a state that may follow its present state."""
        assert state in NEXT_STATES[self.state], (self.state, state)
        self.state = state

    def spent(self) -> dict[str, float]:
        """Return the seconds of each phase of this start so far."""
        times = [*self.tracker.phases, ("", self._clock())]
        return {
            phase: round(ended - began, 3)
            for (phase, began), (_, ended) in pairwise(times)
            if phase != "ready"
        }

    @property
    def start_seconds(self) -> float:
        """The seconds of this start so far, without the worst-case requests."""
        return sum(seconds for phase, seconds in self.spent().items() if phase != "check")

    def _follow(self, now: float) -> None:
        """Move a starting engine to its next phase or to ready, by its probe."""
        probe = self._probe
        if self.state != "starting" or probe is None:
            return
        lines: list[str] = []
        if probe.ready.is_set():
            self._move("ready")
            self.was_ready, self._ready_at = True, now
            if self.clock is not None:  # until now, forwards on pretend GPUs took no time
                self.clock.run()
            lines = self.tracker.enter("ready", now)
        elif probe.worst_cases is not None and probe.healthy.is_set():
            lines = self.tracker.enter("check", now)
        for line in lines:
            self._tell(line)

    def _listen(self, printed: bool, now: float) -> None:
        """Explain each long silence of a starting engine once."""
        if printed or self.state != "starting" or self.tracker.phase in ("serving", "check"):
            self._heard, self._silence_told = now, False
        elif not self._silence_told and now - self._heard >= self._timing.quiet:
            self._silence_told = True
            self._tell(
                silence_words(self.plan, self.planned, self.tracker.phase, self._timing.quiet)
            )

    def _explained_end(self, code: int | None) -> End:
        """Return the end of an engine by its log, its exit code and the kernel's kills."""
        _LOG.info("%s ended with code %s in phase %s", self.name, code, self.tracker.phase)
        before, after = self._kills[0], host_kills()
        kills = None if before is None or after is None else after - before
        return self.tracker.death(Exit(code, kills))
