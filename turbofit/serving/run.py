"""One run of a server: a request or a given plan becomes a reserved plan and a folder.

`Run.prepare` measures under the machine's lock, plans, rehearses and reserves, or refuses.
`Run.begin` makes the run's folder. `start.follow` starts and watches the engines. A
`Reloader` reads the options of a running server again.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from turbofit.core.errors import (
    DoesNotFitError,
    MachineError,
    TurbofitError,
    UsageError,
)
from turbofit.core.messages import BESIDE_COMMANDS, PRETEND
from turbofit.gateway.config import LIVE, GatewayConfig
from turbofit.planning import checks
from turbofit.planning.calibrations import pretends
from turbofit.planning.commands import commands
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import refusal
from turbofit.serving.engine.launches import Launch
from turbofit.serving.engine.lmdeploy import find_lmdeploy, lmdeploy_if_needed
from turbofit.serving.ladder import recall
from turbofit.serving.planner import Planner, can_rehearse
from turbofit.serving.proved import Proof
from turbofit.serving.runs import Record, run_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.core.struct import Options
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.idle import AttachedGateway
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.server import GatewayThread
    from turbofit.serving.engine.lmdeploy import Lmdeploy
    from turbofit.serving.engine.standby import StandbyStarter
    from turbofit.serving.engine.supervised_engine import Examiner
    from turbofit.serving.leases import Leases
    from turbofit.serving.options import ServeConfig

    PublicSide = GatewayThread[Gateway] | AttachedGateway


class Run:
    """One run of a server, from a person's request to the end of the engines.

    `start.follow` may serve the same run again, each time in a new folder. ``on_open`` receives the
    public addresses when engines are ready. ``on_death`` receives the reason when an engine ends,
    if the engine had served or is started again. ``on_tick`` is called at each look at the engines.
    If ``lmdeploy`` is None, the installed LMDeploy is used. An ``examiner`` sends requests to the
    engines, which then have private ports and no gateway. ``publish`` makes a gateway public; None
    gives the gateway an address of its own. ``standby`` starts the engines' processes.

    Raises:
        PackageError: the request needs LMDeploy, which is missing or too old.
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
        """Find LMDeploy and make the planner; `prepare` makes the plan."""
        self.config, self.leases, self._say = config, leases, say
        self.on_open, self.on_tick, self.on_death = on_open, on_tick, on_death
        self.examiner, self.publish, self.standby = examiner, publish, standby
        #: Options that the user gave, by the planner's keywords.
        self.fixed: Options = {} if config.request is None else config.request.given()
        self.lmdeploy = lmdeploy or lmdeploy_if_needed(self.fixed.get("engine"))
        self.planner = Planner(
            config.request, leases, say, pretend=config.pretend,
            # A run on pretend GPUs is its own rehearsal.
            rehearse=not (config.no_rehearse or config.pretend) and can_rehearse(),
            doubled=self.lmdeploy.warning is not None,
            meanwhile=self._import_meanwhile,
            over=lambda plan: Proof(plan, config, self.lmdeploy.version).over,
        )  # fmt: skip
        #: The plan to launch, and the changes of the request that led to this plan.
        self.plan: Plan | None = None
        self.changes: Options = {}
        #: The folder and the record that `begin` made last.
        self.folder: Path
        self.record: Record
        #: Whether grammars can be tried from the start on: a load that is measured has none, and
        #: engines on pretend GPUs need the cores that the process takes for seconds.
        self.starts_trials = not config.pretend
        #: The public side of the gateway that serves now; None while no gateway serves.
        self.public: PublicSide | None = None
        #: Requests that are suspected or refused; the next gateway continues this list.
        self.deny_list: DenyList | None = None

    def _import_meanwhile(self, plan: Plan) -> None:
        """Let a standby import the engine's modules while the engine's plan is rehearsed."""
        if self.standby is not None and plan.backend.of_lmdeploy and self.lmdeploy.argv:
            start = Launch(commands(plan)[0], self.lmdeploy.argv).start_command(0)
            self.standby.expect(start.argv, start.env)
            self.standby.look(plan.host.total)

    def say(self, text: str) -> None:
        """Print progress; ignore errors of the terminal or disk, so that the server goes on."""
        with suppress(OSError, ValueError):
            self._say(text)

    def prepare(self) -> Plan:
        """Return a plan whose memory is reserved: the last plan if it still fits, else a new plan.

        Raises:
            TurbofitError: no plan can be launched.
        """
        if self.leases.alone:
            self._say(f"warning: {self.leases.alone}")
        if self.plan is not None:
            try:
                self.planner.reserve(self.plan)
            except (DoesNotFitError, MachineError, UsageError) as exc:
                self._say(f"the machine changed: {exc.message}; planning again")
            else:
                return self.plan
        self.choose()
        plan = self.checked_plan()
        if self.config.pretend:
            self._say(PRETEND)
        self._say(plan.title)
        self._say(plan.verdict)
        if plan.why_engine:
            self._say(f"engine {plan.why_engine}")
        for reason in plan.reasons:
            # Calibrations and earlier runs may have lowered the margin, so its reason is shown.
            if reason.startswith("margin "):
                self._say(reason)
        for warning in (*plan.warnings, *self._doubts()):
            if not warning.startswith(BESIDE_COMMANDS):  # the gateway does what these ask
                self._say(f"warning: {warning}")
        return plan

    def choose(self) -> Plan:
        """Return the given plan, or a new plan with the settings that earlier starts learned.

        The plan's memory is reserved if the plan fits.
        """
        plan, self.changes = self.config.plan, {}
        if plan is None:
            plan = self._first_plan()
        elif plan.fits:
            self.planner.reserve(plan)
        self.plan = plan
        return plan

    def checked_plan(self) -> Plan:
        """Return the plan, or raise a `TurbofitError` if engines could not serve with the plan."""
        assert self.plan is not None
        if not self.plan.fits:
            raise refusal(self.plan)
        self.config.refuse_names(self.plan)
        if self.config.pretend:
            from turbofit.rehearsal.packages import need_engine

            need_engine(self.plan)
        if self.plan.backend.of_lmdeploy and not self.lmdeploy.argv:
            self.lmdeploy = find_lmdeploy()  # raises an error if LMDeploy is missing or too old
        scene = Scene(Sources(), "launch", plan=self.plan, pretend=self.config.pretend)
        for warning in checks.refuse(scene):
            if warning not in self.plan.warnings:  # the caller prints the plan's own warnings
                self._say(f"warning: {warning}")
        return self.plan

    def _first_plan(self) -> Plan:
        """Return the first plan of a run, with settings that earlier failed starts learned."""
        config, version = self.config, self.lmdeploy.version
        plan = self.planner.make({})
        learned = recall(plan, version, pretend=config.pretend)
        changes = {name: value for name, value in learned.items() if name not in self.fixed}
        if not changes or not plan.fits:
            return plan
        text = ", ".join(f"{name} {value}" for name, value in changes.items())
        again = self.planner.make(changes)
        if not again.fits:
            self._say(f"an earlier launch learned {text}; no plan fits with these settings now")
            return self.planner.make({})
        self._say(f"settings that an earlier launch learned: {text} (--forget drops them)")
        self.changes = changes
        return again

    def _doubts(self) -> list[str]:
        """Return warnings about promises that the launch cannot keep."""
        doubts = [self.lmdeploy.warning] if self.lmdeploy.warning else []
        if self.config.unplanned:
            names = ", ".join(self.config.unplanned)
            doubts.append(f"{names} may take memory that no plan counts")
        if self.config.gateway is None:
            doubts.append(
                "--no-gateway: nobody holds clients to the plan, and a request beyond the plan can "
                "abort the engine"
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
            lmdeploy=self.lmdeploy.version, command=self.config.command,
            defaults=() if self.config.gateway is None else self.config.gateway.defaults.words,
        )  # fmt: skip
        return self.folder


class Reloader:
    """Reads a server's options again, and gives the gateway the options that can change.

    ``options`` are the options of the start, by name. ``read`` returns the current options and a
    gateway configuration made of these options; a wrong option raises a UsageError.
    """

    def __init__(
        self, run: Run, options: Options, read: Callable[[], tuple[Options, GatewayConfig]]
    ) -> None:
        self._run, self._options, self._read = run, dict(options), read
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Reload in a thread of its own: a signal handler must not take a lock."""
        threading.Thread(target=self.reload, name="reload", daemon=True).start()

    def reload(self) -> None:
        """Reload the options, and print the changed options; an error changes nothing."""
        run, before = self._run, self._options
        with self._lock:
            try:
                options, config = self._read()
                gateway, names = run.config.gateway, {**before, **options}
                changed = [name for name in names if before.get(name) != options.get(name)]
                if gateway and gateway.api_key != config.api_key and "api_key" not in changed:
                    changed.append("api_key")  # the key file has other keys now
                taken = [name for name in changed if name in LIVE and gateway is not None]
                if taken and gateway is not None:
                    after = gateway.taking_over(config)
                    if run.public is not None:
                        run.public.call(lambda gateway: gateway.take_over(after))
                    run.config = run.config.changed(gateway=after)  # for the next gateway
            except TurbofitError as exc:
                run.say(f"not reloaded: {exc.message} ({exc.hint})")
                return
            before |= {name: options.get(name) for name in taken}
            if left := [name for name in changed if name not in taken]:
                run.say(f"needs a restart: {', '.join(left)}")
            run.say(f"reloaded: {', '.join(taken) or 'nothing'}")
