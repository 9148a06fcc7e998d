"""One run of a server: plans, reserves memory, makes the run's folder, and follows the engines.

`Run.prepare` measures under the machine's lock, plans, rehearses and reserves, or refuses.
`Run.begin` makes the run's folder. `follow` starts the engines and follows them; one start is a
`Start` (`start.py`).
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

from turbofit.core.errors import (
    DoesNotFitError,
    MachineError,
    OutOfMemoryError,
    TurbofitError,
    UsageError,
)
from turbofit.core.messages import BESIDE_COMMANDS
from turbofit.core.process.files import write_atomic
from turbofit.gateway.server import digest_of, keep_large_blocks
from turbofit.planning import checks
from turbofit.planning.calibrations import pretends
from turbofit.planning.commands import commands
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import refusal
from turbofit.serving.engine.engine_log import EndedError
from turbofit.serving.engine.launches import Launch, find_lmdeploy, lmdeploy_if_needed
from turbofit.serving.ladder import MOST_RUNGS, Learned, Proof, learned_file, recall, rungs
from turbofit.serving.planner import Planner, can_rehearse
from turbofit.serving.runs import Record, run_folder
from turbofit.serving.start import Start
from turbofit.serving.supervisor import StoppedError

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.engine_end import End
    from turbofit.core.plan import Plan
    from turbofit.core.struct import Options
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.idle import AttachedGateway
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.server import GatewayThread
    from turbofit.serving.engine.launches import Lmdeploy
    from turbofit.serving.engine.standby import StandbyStarter
    from turbofit.serving.engine.supervised_engine import Examiner
    from turbofit.serving.ladder import Rung
    from turbofit.serving.leases import Leases
    from turbofit.serving.options import ServeConfig
    from turbofit.serving.supervisor import StopSignal

    PublicSide = GatewayThread[Gateway] | AttachedGateway


class Run:
    """One run of a server, from a person's request to its end.

    It may be followed again, each time in a new folder. ``on_open`` receives the public addresses
    each time they open. ``on_death`` receives the reason when an engine ends that had served or is
    started again. ``on_tick`` is called at each look at the engines. If ``lmdeploy`` is None,
    LMDeploy is looked for. If an ``examiner`` sends the engines requests, they have private ports
    and no gateway. ``publish`` makes a gateway public; None gives it an address of its own.
    ``standby`` starts the engines.

    Raises:
        PackageError: LMDeploy is asked for and missing.
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
        standby: StandbyStarter | None = None,
    ) -> None:
        self.config, self.leases, self._say = config, leases, say
        self.on_open, self.on_tick, self.on_death = on_open, on_tick, on_death
        self.examiner, self.publish, self.standby = examiner, publish, standby
        #: Options that the user gave, by the planner's keywords.
        self.fixed: Options = {} if config.request is None else config.request.given()
        self.lmdeploy = lmdeploy or lmdeploy_if_needed(self.fixed.get("engine"))
        self.planner = Planner(
            config.request, leases, say, pretend=config.pretend,
            # A run on pretend GPUs is its own rehearsal.
            rehearse=config.rehearse and not config.pretend and can_rehearse(),
            doubled=self.lmdeploy.warning is not None,
            meanwhile=self._import_meanwhile,
            over=lambda plan: Proof(plan, config, self.lmdeploy.version).over,
        )  # fmt: skip
        #: The plan that is launched, and the changes of the request that led to it.
        self.plan: Plan | None = None
        self.changes: Options = {}
        #: The folder and the record of the last time that the run was followed.
        self.folder: Path
        self.record: Record
        #: Where clients reach the gateway that serves now.
        self.public: PublicSide | None = None
        #: Requests that are suspected or refused; the next gateway goes on with this list.
        self.deny_list: DenyList | None = None

    def _import_meanwhile(self, plan: Plan) -> None:
        """Let a standby import the engine's modules while the engine's plan is rehearsed."""
        if self.standby is not None and plan.engine.of_lmdeploy and self.lmdeploy.argv:
            start = Launch(commands(plan)[0], self.lmdeploy.argv).start_command(0)
            self.standby.expect(start.argv, start.env)
            self.standby.look(plan.host.total)

    def say(self, text: str) -> None:
        """Print progress; ignore errors of the terminal or disk, so that the server goes on."""
        with suppress(OSError, ValueError):
            self._say(text)

    def prepare(self) -> Plan:
        """Return a plan whose memory is reserved: the last plan if it still fits, else a new one.

        Raises:
            TurbofitError: no plan can be launched.
        """
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
        self._say(plan.title)
        self._say(plan.verdict)
        if plan.why_engine:
            self._say(f"engine {plan.why_engine}")
        for reason in plan.reasons:
            if reason.startswith("margin "):  # calibrations and proofs of earlier runs lower it
                self._say(reason)
        for warning in (*plan.warnings, *self._doubts()):
            if not warning.startswith(BESIDE_COMMANDS):  # a server holds what these ask for
                self._say(f"warning: {warning}")
        return plan

    def choose(self) -> Plan:
        """Return the given plan, or a new one that uses what earlier starts learned.

        The plan's memory is reserved if the plan fits.
        """
        plan, self.changes = self.config.plan, {}
        if plan is None:
            plan = self._first_plan()
        elif plan.fits:
            self.planner.take(plan)
        self.plan = plan
        return plan

    def refuse(self) -> Plan:
        """Return the plan, or raise a `TurbofitError` if it would not serve."""
        assert self.plan is not None
        if not self.plan.fits:
            raise refusal(self.plan)
        if self.plan.engine.of_lmdeploy and not self.lmdeploy.argv:
            self.lmdeploy = find_lmdeploy()  # or raises an error that says what is missing
        scene = Scene(Sources(), "launch", plan=self.plan, pretend=self.config.pretend)
        for warning in checks.refuse(scene):
            if warning not in self.plan.warnings:  # the caller says those
                self._say(f"warning: {warning}")
        return self.plan

    def _first_plan(self) -> Plan:
        config, version = self.config, self.lmdeploy.version
        plan = self.planner.make({})
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
        """Return warnings about what the launch cannot promise."""
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
        """Make the run's folder and its record in the state folder, and return the folder.

        Raises:
            LaunchError: the state folder cannot be written.
        """
        assert self.plan is not None
        self.folder = run_folder(self.plan)
        self.public = self.deny_list = None
        self.record = Record(
            self.folder, model=self.plan.model.name, pretend=self.config.pretend or pretends(),
            lmdeploy=self.lmdeploy.version,
            defaults=() if self.config.gateway is None else self.config.gateway.defaults.words,
        )  # fmt: skip
        return self.folder


def follow(run: Run, stop: StopSignal) -> signal.Signals:
    """Start a run's engines and serve until a signal; return the signal. Call `Run.begin` first.

    Raises:
        TurbofitError: something other than a signal ended the run; the record says what.
    """
    assert run.plan is not None
    keep_large_blocks()  # before the first thread, which would have a heap of its own
    try:
        ended = _follow(run, run.plan, stop)
    except StoppedError as exc:
        run.record.change(state="ended", ended=exc.signal.name)
        raise
    finally:
        # A twin and an overlay can be made again; a timeline looks larger than it is on the disk.
        for name in ("model", "overlay-*", "pretend-*"):
            for room in run.folder.glob(name):
                shutil.rmtree(room, ignore_errors=True)
    run.record.change(state="ended", ended=ended.name)
    return ended


def _follow(run: Run, plan: Plan, stop: StopSignal) -> signal.Signals:
    failed, why = 0, ""
    while True:
        start = Start(run, plan, failed)
        run.record.begin(
            number=failed, changes=run.changes, why=why, settings=plan.settings,
            requests_at_once=plan.requests_at_once,
        )  # fmt: skip
        try:
            return start.run(stop)
        except EndedError as exc:
            end = exc.end
            start.doubt(end)
        except TurbofitError as exc:
            run.record.change(state="failed", ended=exc.to_dict()["error"])
            raise
        run.record.attempt(ended=end.record())
        failed += 1
        step = _step_down(run, plan, end, failed)
        if step is None:
            run.record.change(state="failed", ended=end.record())
            if failed == 1 or not end.is_oom:
                raise end.error
            raise OutOfMemoryError(
                f"out of memory after {failed} starts, the last: {end.error.message}",
                hint=f"see each start in {run.folder}; report it with turbofit diagnose",
            )
        plan, rung = step
        run.changes, why = {**run.changes, **rung.changes}, rung.why
        place = f"warning: ladder {failed}/{MOST_RUNGS}"
        run.say(f"{place}: {end.error.message}")
        run.say(f"{place}: {why}")
        version, pretend = run.lmdeploy.version, run.config.pretend
        learned_file(plan, version, pretend=pretend).write(Learned(changes=run.changes))
        with suppress(TurbofitError):  # on a full disk the file is missing
            path = run.folder / f"plan-{failed}.json"
            write_atomic(path, plan.to_json(), mode=0o600)


def _step_down(run: Run, plan: Plan, end: End, failed: int) -> tuple[Plan, Rung] | None:
    """Return the next plan to start after running out of memory, and the rung that led to it.

    It is the first plan that fits and differs from the last. None if the plan was given, if the
    engine did not run out of memory, or if no rung helps.
    """
    if run.config.plan is not None or not end.is_oom or failed > MOST_RUNGS:
        return None
    run.plan = None  # the plan before the change must not serve
    started = plan if end.group is None else plan.of_group(end.group)
    for rung in rungs(end, started, run.fixed):
        try:
            planned = run.planner.make({**run.changes, **rung.changes})
        except TurbofitError as exc:
            run.say(f"ladder: {rung.why}: {exc.message}")
            continue
        if not planned.fits:
            run.say(f"ladder: {rung.why}: {planned.verdict}")
        elif digest_of(planned) != digest_of(plan):
            return planned, rung
    return None
