"""One launch of `serve`: its plan, made and reserved, and the job that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from turbofit.cli.serving.serve_plan import first_plan, planner_of, read_saved, refuse
from turbofit.core.errors import DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from turbofit.cli.serving.serve_plan import ServeArguments
    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.job import Job
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.planner import Planner
    from turbofit.launch.serve.shared_cards import SharedCards

__all__ = ["PRETEND", "ServeLaunch"]

PRETEND: Final = (
    "PRETEND GPUs: memory, admission, errors and death are real; the words that this server "
    "generates mean nothing"
)


class ServeLaunch:
    """What `serve` does from the command line to a session, once or again and again.

    Args:
        arguments: the command line.
        config: what it asks for.
        say: takes lines of progress.
        shared: the cards, where other models of this turbofit have engines on them.
    """

    def __init__(
        self,
        arguments: ServeArguments,
        config: ServeConfig,
        say: Callable[[str], None],
        shared: SharedCards | None = None,
    ) -> None:
        from turbofit.launch.engine.environment import lmdeploy_if_needed

        self._arguments, self._config, self._say = arguments, config, say
        self._shared = shared
        self._lmdeploy, self._missing = lmdeploy_if_needed(arguments.request.engine)
        self._planner: Planner | None = None
        self._changes: dict[str, Any] | None = None
        #: The newest plan, which has served where a session of it was ready.
        self.newest: Plan | None = None

    def plan(self, leases: Leases) -> Plan:
        """The plan to launch, reserved: the newest one again where the machine is as it was.

        Raises:
            TurbofitError: it would not serve.
        """
        config, lmdeploy = self._config, self._lmdeploy
        if leases.alone:
            self._say(f"warning: {leases.alone}")
        planner = planner_of(
            config, leases, doubled=lmdeploy.warning is not None,
            fitted=self._shared is not None, say=self._say,
        )  # fmt: skip
        self._planner = planner
        plan = self._again(planner)
        if plan is not None:
            return plan
        self._changes = None
        if self._arguments.options.plan:
            plan = read_saved(self._arguments, self._arguments.options.plan)
            if plan.fits:
                planner.take(plan)
        else:
            assert config.request is not None
            plan, self._changes = first_plan(
                config.request, self._arguments.options, planner, lmdeploy.version
            )
        if plan.fits:
            plan = planner.settle(plan, self._changes)
        refuse(plan, self._missing, pretend=config.pretend)
        self._tell(plan)
        self.newest = plan
        return plan

    def _again(self, planner: Planner) -> Plan | None:
        """The newest plan, reserved once more; None where there is none, or no room for it.

        It is as good as a new one while no less is free.
        """
        if self.newest is None:
            return None
        try:
            planner.take(self.newest)
        except DoesNotFitError as exc:
            self._say(f"the machine changed: {exc.message}; planning again")
            return None
        return self.newest

    def _tell(self, plan: Plan) -> None:
        """The verdict, and what the launch cannot promise."""
        self._say(plan.verdict)
        passed, doubts = self._arguments.passed, []
        if self._lmdeploy.warning:
            doubts.append(self._lmdeploy.warning)
        if passed.unplanned:
            doubts.append(
                f"{', '.join(passed.unplanned)} may change memory: the plan does not count it"
            )
        if self._config.gateway is None:
            doubts.append(
                "--no-gateway: the plan holds only while no client asks for more than it; any "
                "client can, and the engine then aborts"
            )
        for warning in (*plan.warnings, *doubts):
            self._say(f"warning: {warning}")

    def job(
        self, plan: Plan, leases: Leases, on_open: Callable[[list[str]], None], **more: Any
    ) -> Job:
        """The run of a plan that `plan` made.

        Args:
            plan: what to launch.
            leases: what it is reserved with.
            on_open: told the public addresses each time that it opens.
            more: what else a `Job` takes.
        """
        from turbofit.launch.serve.download import WeightsFetcher
        from turbofit.launch.serve.job import Job
        from turbofit.launch.serve.record import Record, run_folder

        config, version = self._config, self._lmdeploy.version
        folder = run_folder(plan)
        record = Record(folder, model=plan.model.name, pretend=config.pretend, lmdeploy=version)
        return Job(
            config,
            folder=folder,
            record=record,
            say=self._say,
            on_open=on_open,
            lmdeploy=self._lmdeploy,
            leases=leases,
            fetch=None if config.pretend else WeightsFetcher(self._say),
            replan=None if self._arguments.options.plan else self._replan,
            changes=self._changes,
            shared=self._shared,
            **more,
        )

    def _replan(self, changes: Options) -> Plan:
        """A plan with changes: what was planned before them does not serve."""
        assert self._planner is not None
        self.newest = None
        return self._planner.make(changes)
