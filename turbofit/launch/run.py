"""One run: a request, or a plan that was given, becomes engines that serve until a signal.

`Run.prepare` measures under the machine's lock, plans, rehearses and reserves, or refuses.
`Run.begin` makes the run's folder. `Run.follow` starts the engines and follows them; where memory
runs out, it steps down and starts again. One start is a `Start`.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from turbofit.core.errors import (
    DoesNotFitError,
    MachineError,
    OutOfMemoryError,
    TurbofitError,
    UsageError,
)
from turbofit.core.messages import BESIDE_COMMANDS
from turbofit.core.process.files import write_atomic
from turbofit.gateway.server import keep_large_blocks
from turbofit.launch.engine.engine_log import EndedError
from turbofit.launch.engine.launches import Launch, find_lmdeploy, lmdeploy_if_needed
from turbofit.launch.serve.ladder import MOST_RUNGS, forget, recall, remember, rungs, table
from turbofit.launch.serve.planner import Planner, can_rehearse
from turbofit.launch.serve.proved import Proof
from turbofit.launch.serve.runs import Record, run_folder
from turbofit.launch.serve.supervisor import StoppedError
from turbofit.launch.start import Start
from turbofit.observe.calibrations import pretends
from turbofit.planning import checks
from turbofit.planning.commands import commands
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import refusal

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.core.rehearsal import End
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.models import AttachedGateway
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.server import GatewayThread
    from turbofit.launch.engine.launches import Lmdeploy
    from turbofit.launch.engine.standby import StandbyStarter
    from turbofit.launch.engine.supervised_engine import Examiner
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.ladder import Rung
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.supervisor import StopSignal

    #: An address of a plan's own, or a part of a shared one.
    PublicSide = GatewayThread[Gateway] | AttachedGateway


class Run:
    """A run, from what a person asks for to its end. It may be followed again, in a new folder.

    ``on_open`` is told the public addresses each time that it opens, ``on_death`` why an engine
    ended that had served; ``on_tick`` is called at each look. ``lmdeploy`` None looks for it. An
    ``examiner`` asks the engines, which then have private ports and no gateway. ``publish``: where
    clients reach a gateway; None is an address of its own. ``shared``: other models of this
    turbofit have engines on the cards, too. ``standby`` starts its engines.

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
        on_tick: Callable[[], None] = lambda: None,
        on_death: Callable[[str], None] = lambda _: None,
        lmdeploy: Lmdeploy | None = None,
        examiner: Examiner | None = None,
        publish: Callable[[Gateway], PublicSide] | None = None,
        shared: bool = False,
        standby: StandbyStarter | None = None,
    ) -> None:
        self.config, self.leases, self._say = config, leases, say
        self.on_open, self.on_tick, self.on_death = on_open, on_tick, on_death
        self.examiner, self.publish, self.shared = examiner, publish, shared
        self.standby = standby
        #: What the user gave, by the planner's keywords.
        self.fixed: Options = {} if config.request is None else config.request.given()
        self.lmdeploy = lmdeploy or lmdeploy_if_needed(self.fixed.get("engine"))
        self.planner = Planner(
            config.request, None if config.pretend else leases, say,
            # A run on pretend GPUs is its own rehearsal.
            rehearse=config.rehearse and not config.pretend and can_rehearse(),
            doubled=self.lmdeploy.warning is not None, fitted=shared,
            meanwhile=self._import_meanwhile,
        )  # fmt: skip
        #: What is launched, and the changes that it was planned with.
        self.plan: Plan | None = None
        self.changes: Options = {}
        #: Of the last time that it was followed.
        self.folder: Path
        self.record: Record
        #: Where clients reach the gateway that serves now.
        self.public: PublicSide | None = None
        #: Who is suspected and refused; the next gateway goes on with it.
        self.deny_list: DenyList | None = None

    def _import_meanwhile(self, plan: Plan) -> None:
        """Have the first engine's imports done beside the rehearsal of its plan."""
        if self.standby is not None and plan.engine.of_lmdeploy and self.lmdeploy.argv:
            start = Launch(commands(plan)[0], self.lmdeploy.argv).start_command(0)
            self.standby.expect(start.argv, start.env)
            self.standby.look(plan.host.total)

    def say(self, text: str) -> None:
        """Tell progress; a terminal or disk that takes none costs the line, never the server."""
        with suppress(OSError, ValueError):
            self._say(text)

    def prepare(self) -> Plan:
        """Plan and reserve, or refuse; the last plan is reserved again where its memory is free."""
        if self.leases.alone:
            self._say(f"warning: {self.leases.alone}")
        if self.plan is not None:
            try:
                self.planner.take(self.plan)
            except (DoesNotFitError, MachineError, UsageError) as exc:
                self._say(f"the machine changed: {exc.message}; planning again")
            else:
                return self.plan
        self.choose()
        plan = self.refuse()
        self._say(plan.verdict)
        for warning in (*plan.warnings, *self._doubts()):
            if not warning.startswith(BESIDE_COMMANDS):  # a server holds what these ask for
                self._say(f"warning: {warning}")
        return plan

    def choose(self) -> Plan:
        """Plan with what earlier starts learned, or reserve the plan that was given."""
        plan, self.changes = self.config.plan, {}
        if plan is None:
            plan = self._first_plan()
        elif plan.fits:
            self.planner.take(plan)
        self.plan = plan
        return plan

    def refuse(self) -> Plan:
        """The plan; a `TurbofitError` where it would not serve."""
        assert self.plan is not None
        if not self.plan.fits:
            raise refusal(self.plan)
        if self.plan.engine.of_lmdeploy and not self.lmdeploy.argv:
            self.lmdeploy = find_lmdeploy()  # or says what is missing
        scene = Scene(Sources(), "launch", plan=self.plan, pretend=self.config.pretend)
        checks.refuse(scene)
        return self.plan

    def _first_plan(self) -> Plan:
        config, version = self.config, self.lmdeploy.version
        plan = self.planner.make({})
        if config.forget:
            Proof(plan, config, version).forget()
            if forget(plan, version, pretend=config.pretend):
                self._say("forgot what earlier launches had learned")
            return plan
        learned = recall(plan, version, pretend=config.pretend)
        changes = {name: value for name, value in learned.items() if name not in self.fixed}
        if not changes or not plan.fits:
            return plan
        text = ", ".join(f"{name} {value}" for name, value in changes.items())
        again = self.planner.make(changes)
        if not again.fits:
            self._say(f"an earlier launch learned {text}, but nothing fits with it now")
            return self.planner.make({})
        self._say(f"beginning with what an earlier launch learned: {text} (--forget drops it)")
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

    def begin(self) -> Path:
        """Record what happens in a new folder of the state folder; else a `LaunchError`."""
        assert self.plan is not None
        self.folder = run_folder(self.plan)
        self.public = self.deny_list = None
        self.record = Record(
            self.folder, model=self.plan.model.name, pretend=self.config.pretend or pretends(),
            lmdeploy=self.lmdeploy.version,
            defaults=() if self.config.gateway is None else self.config.gateway.defaults.words,
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
            ended = self._follow(self.plan, stop)
        except StoppedError as exc:
            self.record.change(state="ended", ended=exc.signal.name)
            raise
        finally:
            if self.config.pretend:
                # The twin can be made again; a timeline's length is not its size, but looks so.
                for room in (self.folder / "model", *self.folder.glob("pretend-*")):
                    shutil.rmtree(room, ignore_errors=True)
        self.record.change(state="ended", ended=ended.name)
        return ended

    def _follow(self, plan: Plan, stop: StopSignal) -> signal.Signals:
        failed: list[tuple[Plan, End, str]] = []
        why = ""
        while True:
            start = Start(self, plan, len(failed))
            self.record.begin(
                number=len(failed), changes=self.changes, why=why, settings=plan.settings,
                requests_at_once=plan.requests_at_once,
            )  # fmt: skip
            try:
                return start.run(stop)
            except EndedError as exc:
                end = exc.end
                start.doubt(end)
            except TurbofitError as exc:
                self.record.change(state="failed", ended=exc.to_dict()["error"])
                raise
            self.record.attempt(ended=end.record())
            failed.append((plan, end, why))
            step = self._step_down(plan, end, len(failed))
            if step is None:
                self.record.change(state="failed", ended=end.record())
                raise self._final(failed)
            plan, rung = step
            self.changes, why = {**self.changes, **rung.changes}, rung.why
            place = f"warning: ladder {len(failed)}/{MOST_RUNGS}"
            self.say(f"{place}: {end.error.message}")
            self.say(f"{place}: {why}")
            version, pretend = self.lmdeploy.version, self.config.pretend
            remember(plan, version, pretend=pretend, changes=self.changes, why=why)
            with suppress(TurbofitError):  # a full disk costs the file
                path = self.folder / f"plan-{len(failed)}.json"
                write_atomic(path, plan.to_json(), mode=0o600)

    def _step_down(self, plan: Plan, end: End, failed: int) -> tuple[Plan, Rung] | None:
        """The first rung of which the planner makes another plan that fits."""
        if self.config.plan is not None or not end.is_oom or failed > MOST_RUNGS:
            return None
        self.plan = None  # what is planned before a change does not serve
        started = plan if end.group is None else plan.of_group(end.group)
        for rung in rungs(end, started, self.fixed):
            try:
                planned = self.planner.make({**self.changes, **rung.changes})
            except TurbofitError as exc:
                self.say(f"ladder: {rung.why}: {exc.message}")
                continue
            if not planned.fits:
                self.say(f"ladder: {rung.why}: {planned.verdict}")
            elif _engines(planned) != _engines(plan):
                return planned, rung
        return None

    def _final(self, failed: list[tuple[Plan, End, str]]) -> TurbofitError:
        """The last error; of a lack of memory, after the table of all starts."""
        end = failed[-1][1]
        if not end.is_oom or (len(failed) == 1 and end.kind == "hang"):
            return end.error
        for row in table(failed):
            self.say(row)
        if len(failed) == 1:
            return end.error
        return OutOfMemoryError(
            f"out of memory after {len(failed)} starts, the last: {end.error.message}",
            hint=f"see the table above, and {self.folder}; report it with turbofit diagnose",
        )


def _engines(plan: Plan) -> tuple[Any, ...]:
    """All that its engines are started with and held to."""
    groups = [(group.settings, group.units_per_forward) for group in plan.by_group]
    return plan.settings, plan.limits, groups
