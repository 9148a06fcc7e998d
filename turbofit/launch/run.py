"""One run: a request, or a plan that was given, becomes engines that serve until a signal.

`Run.prepare` measures under the machine's lock, plans, rehearses and reserves, or refuses.
`Run.begin` makes the run's folder. `Run.follow` starts the engines and follows them; where memory
runs out, it steps down and starts again. One start is a `Start`.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import DoesNotFitError, OutOfMemoryError, TurbofitError
from turbofit.core.process.files import write_atomic
from turbofit.gateway.allocator import keep_large_blocks
from turbofit.launch.engine.engine_exit import EndedError
from turbofit.launch.engine.environment import lmdeploy_if_needed
from turbofit.launch.serve.download import WeightsFetcher
from turbofit.launch.serve.ladder import (
    MOST_RUNGS,
    forget,
    merged,
    recall,
    remember,
    rungs,
    table,
)
from turbofit.launch.serve.planner import Planner, can_rehearse
from turbofit.launch.serve.record import Record, facts_of, run_folder
from turbofit.launch.serve.start import Start
from turbofit.launch.serve.supervisor import StoppedError
from turbofit.planning import checks
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import refusal

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.launch.engine.environment import Lmdeploy
    from turbofit.launch.engine.fitted_cache import SharedCards
    from turbofit.launch.engine.supervised_engine import Examiner
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.ladder import Rung
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.start import PublicSide
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.observe.ends import End

__all__ = ["Run"]


class Run:
    """From what is asked for to its end. It may be prepared and followed again, in a new folder.

    Args:
        config: what is asked for.
        leases: the machine's reservations.
        say: takes lines of progress.
        on_open: called with the public addresses each time that it opens.
        on_death: told why an engine ended that had served.
        lmdeploy: the LMDeploy that is started; None looks for it.
        examiner: looks closer at the engines; they are on private ports then, with a key and
            without a gateway.
        publish: where clients reach a gateway; None is an address of its own.
        shared: the cards, where other models of this turbofit have engines on them.

    Raises:
        PackageError: LMDeploy is missing, and was asked for.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        config: ServeConfig,
        leases: Leases,
        say: Callable[[str], None],
        *,
        on_open: Callable[[list[str]], None] = lambda _: None,
        on_death: Callable[[str], None] = lambda _: None,
        lmdeploy: Lmdeploy | None = None,
        examiner: Examiner | None = None,
        publish: Callable[[Gateway], PublicSide] | None = None,
        shared: SharedCards | None = None,
    ) -> None:
        self.config, self.leases, self._say = config, leases, say
        self.on_open, self.on_death = on_open, on_death
        self.examiner, self.publish, self.shared = examiner, publish, shared
        #: What the user gave, by the fields of `PlanRequest`.
        self.fixed: Options = {} if config.request is None else config.request.given()
        if lmdeploy is None:
            lmdeploy, self._missing = lmdeploy_if_needed(self.fixed.get("engine"))
        else:
            self._missing = None
        self.lmdeploy = lmdeploy
        self.planner = Planner(
            config.request, None if config.pretend else leases, say,
            # A run on pretend GPUs is its own rehearsal.
            rehearse=config.rehearse and not config.pretend and can_rehearse(),
            doubled=lmdeploy.warning is not None, fitted=shared is not None,
        )  # fmt: skip
        #: Plans again with changes; None where the plan may not change.
        self.replan = None if config.plan is not None else self.planner.make
        #: Brings a plan's weights onto this machine; None leaves that to LMDeploy.
        self.fetch: Callable[[Plan], Plan] | None = None if config.pretend else WeightsFetcher(say)
        #: What is launched, and the changes that it was planned with.
        self.plan: Plan | None = None
        self.changes: Options = {}
        #: Of the last time that it was followed.
        self.folder: Path
        self.record: Record
        #: The gateway that serves now.
        self.front: PublicSide | None = None
        #: Who is suspected and refused; the next gateway goes on with it.
        self.deny_list: DenyList | None = None

    def say(self, text: str) -> None:
        """Progress; a terminal or a disk that takes none costs the line, never the server."""
        with suppress(OSError, ValueError):
            self._say(text)

    # What is launched.

    def prepare(self) -> Plan:
        """Choose what is launched, and reserve it: the last plan again where it still has its room.

        Raises:
            TurbofitError: it would not serve.
        """
        if self.leases.alone:
            self._say(f"warning: {self.leases.alone}")
        if self._again():
            assert self.plan is not None
            return self.plan
        self.choose()
        plan = self.settle()
        self._say(plan.verdict)
        for warning in (*plan.warnings, *self._doubts()):
            self._say(f"warning: {warning}")
        return plan

    def choose(self) -> Plan:
        """Plan, with what earlier starts have learned, or take the plan that was given."""
        plan, self.changes = self.config.plan, {}
        if plan is None:
            plan = self._first_plan()
        elif plan.fits:
            self.planner.take(plan)
        self.plan = plan
        return plan

    def settle(self) -> Plan:
        """The last look before the launch: the plan, or another one where the machine changed.

        Raises:
            TurbofitError: it would not serve.
        """
        assert self.plan is not None
        if self.plan.fits:
            changes = None if self.config.plan is not None else self.changes
            self.plan = self.planner.settle(self.plan, changes)
        return self.refuse()

    def refuse(self) -> Plan:
        """The plan, where it would serve.

        Raises:
            TurbofitError: it would not.
        """
        assert self.plan is not None
        if not self.plan.fits:
            raise refusal(self.plan)
        if self._missing is not None and self.plan.engine.of_lmdeploy:
            raise self._missing
        scene = Scene(Sources(), "launch", plan=self.plan, pretend=self.config.pretend)
        checks.refuse(scene)
        return self.plan

    def _again(self) -> bool:
        """Whether the last plan is reserved once more: it is as good as a new one."""
        if self.plan is None:
            return False
        try:
            self.planner.take(self.plan)
        except DoesNotFitError as exc:
            self._say(f"the machine changed: {exc.message}; planning again")
            return False
        return True

    def _first_plan(self) -> Plan:
        config, version = self.config, self.lmdeploy.version
        plan = self.planner.make({})
        if config.forget:
            if forget(plan, version, pretend=config.pretend):
                self._say("forgot what earlier launches had learned")
            return plan
        learned = recall(plan, version, pretend=config.pretend)
        changes = {name: value for name, value in learned.items() if name not in self.fixed}
        if not changes or not plan.fits:
            return plan
        said = ", ".join(f"{name} {value}" for name, value in changes.items())
        again = self.planner.make(changes)
        if not again.fits:
            self._say(f"an earlier launch learned {said}, but nothing fits with it now")
            return self.planner.make({})
        self._say(f"beginning with what an earlier launch learned: {said} (--forget drops it)")
        self.changes = changes
        return again

    def _doubts(self) -> list[str]:
        """What the launch cannot promise."""
        doubts = [self.lmdeploy.warning] if self.lmdeploy.warning else []
        if self.config.unplanned:
            names = ", ".join(self.config.unplanned)
            doubts.append(f"{names} may change memory: the plan does not count it")
        if self.config.gateway is None:
            doubts.append(
                "--no-gateway: the plan holds only while no client asks for more than it; any "
                "client can, and the engine then aborts"
            )
        return doubts

    # The engines.

    def begin(self, folder: Path | None = None) -> Path:
        """Record what happens from now on, in a folder: None makes one of the state folder.

        Raises:
            LaunchError: it cannot be made.
        """
        assert self.plan is not None
        self.folder = folder or run_folder(self.plan)
        self.front = self.deny_list = None
        self.record = Record(
            self.folder, model=self.plan.model.name, pretend=self.config.pretend,
            lmdeploy=self.lmdeploy.version, calibrates=self.examiner is not None,
        )  # fmt: skip
        return self.folder

    def follow(self, stop: StopSignal) -> signal.Signals:
        """Start the engines of the plan, serve, and come back by a signal; `begin` came before.

        Raises:
            TurbofitError: it ended otherwise than by a signal; the record says how.
        """
        assert self.plan is not None
        keep_large_blocks()  # before the first thread, which would have a heap of its own
        try:
            return self._follow(self.plan, stop)
        except StoppedError as exc:
            self.record.state("ended", ended=exc.signal.name)
            raise
        finally:
            if self.config.pretend:
                # The twin can be made again; a timeline's length is not its size, but looks so.
                for room in (self.folder / "model", *self.folder.glob("pretend-*")):
                    shutil.rmtree(room, ignore_errors=True)

    def _follow(self, plan: Plan, stop: StopSignal) -> signal.Signals:
        failed: list[tuple[Plan, End, str]] = []
        why = ""
        while True:
            if failed:
                with suppress(TurbofitError):  # a full disk costs the file
                    path = self.folder / f"plan-{len(failed)}.json"
                    write_atomic(path, plan.to_json(), mode=0o600)
            start = Start(self, plan, len(failed))
            number = len(failed)
            self.record.begin(number=number, changes=self.changes, why=why, **facts_of(plan))
            try:
                with ExitStack() as stack:
                    ended = start.run(stop, stack)
            except EndedError as exc:
                end = exc.ending
            except TurbofitError as exc:
                self.record.state("failed", ended=exc.to_dict()["error"])
                raise
            else:
                if self.changes and start.was_ready:
                    self._remember(plan, why)
                self.record.state("ended", ended=ended.name)
                return ended
            self.record.attempt(ended=end.record(), ended_at=time.strftime("%H:%M:%S"))
            failed.append((plan, end, why))
            step = self._step_down(plan, end, len(failed))
            if step is None:
                self.record.state("failed", ended=end.record())
                raise self._final(failed)
            plan, rung = step
            self.changes, why = merged(self.changes, rung), rung.why
            place = f"warning: ladder {len(failed)}/{MOST_RUNGS}"
            self.say(f"{place}: {end.error.message}")
            self.say(f"{place}: {why}")
            self._remember(plan, why)

    def _remember(self, plan: Plan, why: str) -> None:
        """Keep what made the plan start, for the next run of this kind."""
        version, pretend = self.lmdeploy.version, self.config.pretend
        remember(plan, version, pretend=pretend, changes=self.changes, why=[why])

    def _step_down(self, plan: Plan, end: End, failed: int) -> tuple[Plan, Rung] | None:
        """The next rung that the planner can make a plan of, and that is another one."""
        if self.replan is None or not end.is_oom or failed > MOST_RUNGS:
            return None
        self.plan = None  # what is planned before a change does not serve
        started = plan if end.group is None else plan.of_group(end.group)
        for rung in rungs(end, started, self.fixed):
            try:
                planned = self.replan(merged(self.changes, rung))
            except TurbofitError as exc:
                self.say(f"ladder: {rung.why}: {exc.message}")
                continue
            if not planned.fits:
                self.say(f"ladder: {rung.why}: {planned.verdict}")
            elif _engines(planned) != _engines(plan):
                return planned, rung
        return None

    def _final(self, failed: list[tuple[Plan, End, str]]) -> TurbofitError:
        """The last error, with the table of all starts before it where there were several."""
        end = failed[-1][1]
        if not end.is_oom:
            return end.error
        if len(failed) == 1 and isinstance(end.error, DoesNotFitError):
            return end.error
        for line in table(failed):
            self.say(line)
        if len(failed) == 1:
            return end.error
        return OutOfMemoryError(
            f"out of memory after {len(failed)} starts, the last: {end.error.message}",
            hint=f"see the table above, and {self.folder}; report it with turbofit diagnose",
        )


def _engines(plan: Plan) -> tuple[Any, ...]:
    """All that its engines are started with and held to."""
    groups = [(one.settings, one.units_per_forward) for one in plan.by_group]
    return plan.settings, plan.limits, groups
