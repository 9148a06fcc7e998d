"""An engine on pretend GPUs: the launch of the engine, and its memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from msgspec.structs import replace

from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.rehearsal.checkpoint.twin import checkpoint_for
from turbofit.rehearsal.packages import DRAFT, INSIDE, engine_library, need_engine
from turbofit.rehearsal.plan_clock import step_table
from turbofit.rehearsal.planned import charged
from turbofit.rehearsal.pretend.clock import CLOCK, ClockFile
from turbofit.rehearsal.pretend.command import cuda_site, find_turbofit, put_first
from turbofit.rehearsal.pretend.record import TimelineMemory, processes_in
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

    Each start has a pretend machine of its own, with a scenario and a timeline in ``folder``.
    Forwards of a ready engine take ``factor`` times the forecast's seconds.
    """

    plan: Plan
    folder: Path
    factor: float = 0.0

    def start_command(self, number: int) -> StartCommand:
        """Make the pretend machine of this start; return the command, environment and timeline."""
        folder, argv = self.folder / f"{self.group}-{number}", self.argv()
        # The files of the start before this one are large.
        shutil.rmtree(self.folder / f"{self.group}-{number - 1}", ignore_errors=True)
        machine = charged(self.plan, self.group)
        if self.plan.backend.on_torch:
            env = self._torch_environment(machine, folder, {**os.environ, **self.command.env})
            return StartCommand(argv, self.environment(env), folder)
        env = server_environment(machine, folder)
        clock = ClockFile(folder / "clock", self.factor) if self.factor else None
        if clock is not None:
            clock.write(step_table(self.plan, self.plan.engines[self.group]))
            env[CLOCK] = str(clock.path)
        return StartCommand(argv, self.environment(env), folder / "timeline", clock)

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
        env = prepare(machine, folder, env, site=cuda_site())
        alone = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "RAY_ADDRESS": "local"}
        return {**env, **alone}


class PretendUsage(Struct):
    """Bytes in use on one pretend GPU: the peak, and the use now."""

    gpu: int
    peak: int
    in_use: int


class PretendReader:
    """Reads how much memory one start of a group's engine uses on its pretend GPUs.

    ``timeline`` is `StartCommand.timeline`. Each reading of TurboMind's timeline begins at the end
    of the last reading.
    """

    def __init__(self, plan: Plan, group: int, timeline: Path) -> None:
        self.timeline = timeline
        self._plan, self._group = plan, group
        #: The pretend machine, with the bytes that other processes hold.
        self._machine = charged(plan, group)
        #: One thread reads at a time: the supervisor's or the gateway's.
        self._reading = Lock()

    def usages(self) -> tuple[PretendUsage, ...]:
        """Return the use of each pretend GPU of the group so far; empty if unreadable."""
        others = [gpu.used for gpu in self._machine.gpus]
        with self._reading:
            if self._plan.backend.on_torch:
                sizes = self._torch_held()
            else:
                memory = self._memory.read()
                cards = () if memory is None else memory.cards
                sizes = [(max(card.peak.values(), default=0), card.in_use) for card in cards]
                # A timeline has the allocations alone; the shared file also has the late bytes.
                others = [gpu.used + gpu.late for gpu in self._machine.gpus]
        indices = self._plan.groups[self._group]
        return tuple(
            PretendUsage(gpu=index, peak=before + peak, in_use=before + now)
            for index, before, (peak, now) in zip(indices, others, sizes, strict=False)
        )

    def _torch_held(self) -> list[tuple[int, int]]:
        """Return the peak and the use now of each GPU of an engine on torch, in bytes."""
        try:
            shared = processes_in(self.timeline)
        except (OSError, ValueError):
            return []
        sizes = map(shared.held, range(len(self._machine.gpus)))
        return list(zip(shared.peak, sizes, strict=False))

    @cached_property
    def _memory(self) -> TimelineMemory:
        """TurboMind's memory, by its timeline."""
        return TimelineMemory(self.timeline, self._machine, engine_library())
