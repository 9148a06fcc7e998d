"""An engine on pretend GPUs: the launch of the engine, and its memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.packages import DRAFT, INSIDE, need_engine
from turbofit.rehearsal.plan_clock import step_table
from turbofit.rehearsal.planned import charged
from turbofit.rehearsal.pretend.clock import CLOCK, ClockFile
from turbofit.rehearsal.pretend.command import cuda_site, find_turbofit, put_first
from turbofit.rehearsal.pretend.record import processes_in
from turbofit.rehearsal.pretend.run import prepare
from turbofit.rehearsal.pretend.scenario import Scenario
from turbofit.rehearsal.turbomind.server import server_environment
from turbofit.serving.engine.launches import Launch, StartCommand


def with_checkpoint(plan: Plan, folder: Path) -> Plan:
    """Return the plan with a checkpoint on disk: the model's own, or a twin made in ``folder``.

    A twin has a checkpoint's headers without weights; the twin's folder has the model's name.

    Raises:
        UsageError: the model's own checkpoint is needed, and is not on disk.
    """
    name = (plan.model.hub_id or plan.model.name).rpartition("/")[2]
    # LMDeploy chooses chat templates by the folder's name.
    checkpoint = checkpoint_for(plan.model, folder / name, torch=plan.backend.on_torch)
    source = replace(plan.model.source, checkpoint=str(checkpoint))
    return replace(plan, model=replace(plan.model, source=source))


@dataclass(kw_only=True)
class PretendLaunch(Launch):
    """An engine on pretend GPUs: LMDeploy's own server and engine, which compute nothing.

    Each start has a pretend machine of its own, whose files are in ``folder``.
    Forwards of a ready engine take ``factor`` times the forecast's seconds.
    """

    plan: Plan
    folder: Path
    factor: float = 0.0

    def start_command(self, number: int) -> StartCommand:
        """Make the pretend machine of this start; return the command and environment."""
        folder, clock = self.folder / f"{self.group}-{number}", None
        # The files of the start before are large. A start that failed has left files, too.
        for old in (number - 1, number):
            shutil.rmtree(self.folder / f"{self.group}-{old}", ignore_errors=True)
        machine = charged(self.plan, self.group)
        if self.plan.backend.on_torch:
            env = self._torch_environment(machine, folder, {**os.environ, **self.command.env})
        else:
            env = server_environment(machine, folder)
        if self.factor and not self.plan.backend.on_torch:
            clock = ClockFile(folder / "clock", self.factor)
            clock.write(step_table(self.plan, self.plan.engines[self.group]))
            env[CLOCK] = str(clock.path)
        return StartCommand(self.argv(), self.environment(env), folder, clock)

    def _torch_environment(
        self, machine: Scenario, folder: Path, base: Mapping[str, str]
    ) -> dict[str, str]:
        """Make ``folder``; return an environment in which LMDeploy's server finds pretend cards."""
        plan, env = self.plan, dict(base)
        need_engine(plan)
        if plan.backend.of_lmdeploy:
            put_first(env, "PYTHONPATH", str(INSIDE))
            if plan.model.draft:
                put_first(env, "PYTHONPATH", str(DRAFT))
            find_turbofit(env)
        alone = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "RAY_ADDRESS": "local"}
        return {**prepare(machine, folder, env, site=cuda_site()), **alone}


class PretendUsage(Struct):
    """Bytes in use on one pretend GPU: the peak, and the use now."""

    gpu: int
    peak: int
    in_use: int


class PretendReader:
    """Reads how much memory one start of a group's engine uses on its pretend GPUs.

    ``machine`` is `StartCommand.machine`.
    """

    def __init__(self, plan: Plan, group: int, machine: Path) -> None:
        self._machine, self._indices = machine, plan.groups[group]
        #: The bytes of each pretend GPU that are in use before the engine's processes start.
        self._before = [gpu.used for gpu in charged(plan, group).gpus]

    def usages(self) -> tuple[PretendUsage, ...]:
        """Return the use of each pretend GPU of the group so far; empty if unreadable."""
        try:
            shared = processes_in(self._machine)
        except (OSError, ValueError):
            return ()
        return tuple(
            PretendUsage(gpu=gpu, peak=used + shared.peak[place], in_use=used + shared.held(place))
            for place, (gpu, used) in enumerate(zip(self._indices, self._before, strict=True))
        )
