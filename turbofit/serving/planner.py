"""Makes the plans of a launch: measures, plans and reserves under the machine's lock.

Memory that other turbofits have reserved counts as used. Pretend GPUs are not measured; only the
reservations of other pretend servers count on pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.core.process.files import digest_of_parts, needed_state_dir
from turbofit.core.process.progress import under_way
from turbofit.core.process.variables import leases_folder
from turbofit.core.promise import Promise
from turbofit.core.struct import Options
from turbofit.machine.learned import forget
from turbofit.memory.calibrated import identity
from turbofit.model.source import resolve_model
from turbofit.planning.calibrations import pretends
from turbofit.planning.checks import refuse
from turbofit.planning.examine.scene import Scene, Sources
from turbofit.planning.plan import doubled_margin, finished, refusal
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.tuned import same_shape
from turbofit.serving.leases import Leases, counted, end_orphans
from turbofit.serving.options import ServeConfig
from turbofit.serving.proved import Rehearsals, ratios

#: The most characters of a failed rehearsal's reason that are shown.
_SHOWN: Final = 200
_WAITING: Final = "waiting: another turbofit is planning"


@dataclass
class Planner:
    """Makes the plans of one run.

    ``request`` is None if the run has a given plan, which the planner only reserves. ``rehearse``:
    each plan is rehearsed. ``doubled``: margins are doubled, since the account is for another
    version of LMDeploy. ``meanwhile`` is called with each plan before its rehearsal. ``over``
    returns the bytes that engines of a plan held here beyond the forecast, None without a proof.
    """

    request: PlanRequest | None
    leases: Leases
    say: Callable[[str], None]
    _: KW_ONLY
    rehearse: bool
    pretend: bool = False
    doubled: bool = False
    meanwhile: Callable[[Plan], None] = lambda _plan: None
    over: Callable[[Plan], int | None] = lambda _plan: None

    def make(self, changes: Options, promise: Promise | None = None) -> Plan:
        """Plan the user's request with ``changes``; reserve the memory of a plan that fits.

        ``promise`` is an earlier plan's; None: the plan makes its own.
        """
        assert self.request is not None
        request = self.request.changed(**changes)
        with under_way("planning"), self.leases.locked(partial(self.say, _WAITING)):
            plan = self._plan_and_rehearse(
                request.changed(on=self._machine(request.gpus), gpus=None), promise
            )
            if plan.fits:
                self.leases.reserve(plan)
        return plan

    def reserve(self, plan: Plan) -> None:
        """Reserve the memory of a given plan, if the machine has not changed.

        Raises:
            DoesNotFitError: other processes use memory that the plan needs.
            MachineError: a GPU is missing.
            UsageError: the plan names no machine.
        """
        with self.leases.locked(partial(self.say, _WAITING)):
            here = self._machine(None, plan.machine)
            refuse(Scene(Sources(), "lease", machine=here, plan=plan, pretend=self.pretend))
            self.leases.reserve(plan)

    def _machine(self, gpus: str | None, planned: Machine | None = None) -> Machine:
        """Return the present machine; memory that other turbofits have reserved counts as used.

        First, engines of dead turbofits are ended, since such engines may still be loading. On
        pretend GPUs the result is the request's machine, or ``planned``, a given plan's machine.
        """
        from turbofit.machine.source import machine_from

        for text in end_orphans(self.leases):
            self.say(f"warning: {text}")
        pretend = planned if self.request is None else self.request.on
        here = machine_from(pretend if self.pretend else None, gpus=gpus)
        return counted(here, self.leases)

    def _plan_and_rehearse(self, request: PlanRequest, promise: Promise | None) -> Plan:
        """Make and rehearse the plan of a request, and raise its cache ratio where possible.

        To double the margin, the request is planned a second time.
        """
        pretend = self.pretend or None  # None: tunings and calibrations of this machine
        plan = best_plan(request, pretend=pretend, promise=promise)
        if self.doubled and request.margin is None and plan.fits:
            request = request.changed(margin=doubled_margin(plan))
            plan = best_plan(request, pretend=pretend, promise=promise)
        if self.rehearse and plan.fits:
            rehearsals = Rehearsals(plan)
            rehearsed_before = rehearsals.recall(plan.machine)
            if rehearsed_before is not None:
                self.say("rehearsed before: the versions are the same, and no less memory is free")
                plan = rehearsed_before
            else:
                plan = self._rehearsed(request, plan)
                if plan.fits and plan.rehearsal is not None and plan.rehearsal.outcome == "served":
                    rehearsals.keep(plan)
        return self._raised(request, plan)

    def _raised(self, request: PlanRequest, plan: Plan) -> Plan:
        """Return the plan with a higher cache ratio if a start here proved a smaller margin."""
        # Pretend GPUs prove nothing about memory, and the user's own margin stays.
        may_raise = not self.pretend and request.margin is None
        over = self.over(plan) if may_raise and plan.fits else None
        if over is None:
            return plan
        here = request.changed(model=plan.model, revision=None, on=plan.machine, gpus=None)
        raised = finished(same_shape(here, plan, {}, over=over), request)
        if not raised.fits or ratios(raised) <= ratios(plan):
            return plan
        before, after = ratios(plan)[0], ratios(raised)[0]
        self.say(f"proved here before: the cache ratio is raised from {before:.3f} to {after:.3f}")
        return raised

    def _rehearsed(self, request: PlanRequest, plan: Plan) -> Plan:
        """Rehearse a plan that fits; return the plan with the rehearsal's corrections.

        A rehearsal that cannot run, or that fails itself, says nothing about the plan's memory. The
        plan then still fits, with the ratios that earlier rehearsals of this call have lowered.
        """
        from turbofit.rehearsal.confirm import rehearsed

        self.meanwhile(plan)  # work that can be done beside the rehearsal
        self.say("rehearsing: LMDeploy's own engine on pretend GPUs, some seconds")
        try:
            checked = rehearsed(request, plan)
        except (PackageError, UsageError) as exc:
            self.say(f"not rehearsed: {exc.message}")
            return plan
        rehearsal = checked.rehearsal
        if rehearsal is None or rehearsal.outcome != "failed":
            return checked
        # `where` is the engine's call in which the rehearsal failed, or the reason.
        why = rehearsal.death.where if rehearsal.death is not None else "no reason given"
        self.say(f"not rehearsed: the rehearsal failed: {why[:_SHOWN]}")
        if ratios(checked) == ratios(plan):
            return plan
        # An earlier rehearsal lowered the ratios; the lower ratios stay. The failure alone made
        # `checked` a plan that does not fit and has no command to serve: both are set back.
        text = f"fits: {checked.kv_tokens:,} KV tokens, at a ratio that a rehearsal lowered"
        return replace(checked, fits=True, verdict=text, serve=plan.serve)


def leases_for(config: ServeConfig) -> Leases:
    """Return the leases of this machine, or of a pretend machine.

    Each SPEC of a pretend machine has its own folder of leases, for this user alone.

    Raises:
        LaunchError: the state folder cannot be written; it has the leases of pretend machines.
    """
    from turbofit.machine.source import machine_from

    if not config.pretend:
        return Leases()
    given = config.plan.machine if config.plan is not None else None
    machine = machine_from(given if config.request is None else config.request.on)
    folder = leases_folder() or needed_state_dir("pretend") / "leases"
    return Leases(folder.with_name(f"{folder.name}-pretend-{digest_of_parts(machine.name)}"))


def can_rehearse() -> bool:
    """Return whether this Python has LMDeploy and this machine has a C compiler."""
    from importlib.util import find_spec

    from turbofit.rehearsal.pretend.build import find_compiler

    return find_spec("lmdeploy") is not None and find_compiler() is not None


def preview(config: ServeConfig) -> Plan:
    """Return the plan to launch, neither reserved nor rehearsed.

    Raises:
        DoesNotFitError: no plan fits.
        PackageError: the engine cannot run on pretend GPUs here.
    """
    plan = config.plan
    if plan is None:
        assert config.request is not None
        plan = best_plan(config.request, pretend=config.pretend or None)
    if not plan.fits:
        raise refusal(plan)
    if config.pretend:
        from turbofit.rehearsal.packages import need_engine

        need_engine(plan)
    return plan


def forget_learned(model: str | Model, *, pretend: bool) -> int:
    """Forget all that starts here learned about a model; return the number of documents."""
    found = resolve_model(model) if isinstance(model, str) else model
    return forget(identity(found), pretend=pretend or pretends())


def launch_request(request: PlanRequest, *, pretend: bool) -> PlanRequest:
    """Return the request of a launch, with the calibrations that are valid for its machine.

    On pretend GPUs, a described machine gets the calibrations of pretend runs; a copy of this
    machine keeps the calibrations of the real cards.

    Raises:
        UsageError: the model is a missing path, or has no stand-in for pretend GPUs.
    """
    from turbofit.machine.source import machine_from
    from turbofit.model.source import refuse_missing_folder
    from turbofit.planning.calibrations import with_calibrations

    refuse_missing_folder(request.model)
    if not pretend:
        return request
    from turbofit.rehearsal.confirm import refuse_untwinned

    refuse_untwinned(request)
    assert not isinstance(request.on, Machine)  # the command line names a machine by a text
    machine = machine_from(request.on, gpus=request.gpus)
    if machine.source != "nvml":
        machine = with_calibrations(machine, pretend=True)
    return request.changed(on=machine, gpus=None)
