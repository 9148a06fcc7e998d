"""Describes how a start launches its engines: checkpoint, ports, commands, key and time."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from turbofit.core.plan import Command, Plan
from turbofit.core.process.network import free_ports
from turbofit.core.struct import Options
from turbofit.model.adapter_folders import with_copies
from turbofit.planning.commands import commands, module_of, private_commands
from turbofit.rehearsal.plan_clock import clock_for
from turbofit.serving.engine.engine_client import Timing
from turbofit.serving.engine.launches import Launch, ratio_now, shared_ratio
from turbofit.serving.engine.lmdeploy import module_runner
from turbofit.serving.engine.parsers import parser_options
from turbofit.serving.images.preparation import image_environment
from turbofit.serving.run import Run
from turbofit.serving.weights import fetched


class LaunchDescription:
    """The engines of start ``number`` of a run, ready to be launched.

    ``plan`` has its checkpoint on disk; ``launches`` has an entry for each engine. ``key`` is the
    engines' secret key, None if clients reach the engines directly. ``overlay`` is the folder that
    engines with a secret key open in the checkpoint's place. ``options`` are LMDeploy's options,
    with the parsers of the model's family. ``clock`` says how time passes on pretend GPUs.
    ``timing`` has the deadlines, with longer ones for slow pretend GPUs. ``holders`` gets the
    sockets that keep the engines' ports from other programs.

    Raises:
        TurbofitError: the checkpoint cannot be fetched, or the overlay cannot be made.
    """

    def __init__(self, run: Run, plan: Plan, number: int, holders: ExitStack) -> None:
        """Fetch the checkpoint, make the overlay, and describe each engine's launch."""
        #: The beginning of the start, by `time.monotonic`.
        self.began = time.monotonic()
        config, timing = run.config, run.config.timing
        self._run, self._number = run, number
        self.key: str | None = None
        self.overlay: Path | None = None
        self.options = list(config.options)
        self.plan = self._with_checkpoint(plan)
        self.clock = clock_for(plan, config.clock or 0.0)
        slower = max(1.0, self.clock.factor)
        self.timing: Timing = replace(
            timing, drain=slower * timing.drain, patience=slower * timing.patience
        )
        if config.gateway is None and run.examiner is None:
            engine_commands = commands(
                self._with_adapters(),
                port=config.port,
                name=config.client_name(plan.model),
                options=config.options,
            )
        else:
            engine_commands = self._private_commands(holders)
        self.launches = [self._launch(*numbered) for numbered in enumerate(engine_commands)]

    def prepare(self) -> None:
        """Make the folders that an engine opens; call this before each start of an engine.

        Raises:
            UsageError: the checkpoint is not on this machine.
            LaunchError: the folder cannot be made.
        """
        where = self.plan.model.source.checkpoint
        if self._run.config.pretend and where is not None and not os.path.isdir(where):
            self._with_checkpoint(self.plan)
        self._with_adapters()
        if self.overlay is not None:
            self._make_overlay()

    def _with_checkpoint(self, plan: Plan) -> Plan:
        """Return the plan with its checkpoint on disk: downloaded, or a twin on pretend GPUs."""
        run = self._run
        if not run.config.pretend:
            return replace(plan, model=fetched(plan.model, run.say))
        from turbofit.serving.engine.pretend_launch import with_checkpoint

        return with_checkpoint(plan, run.folder / "model")

    def _with_adapters(self) -> Plan:
        """Return the plan with the folders of adapters that engines open."""
        return with_copies(self.plan, self._run.folder / f"overlay-{self._number}-adapters")

    def _make_overlay(self) -> Path:
        from turbofit.serving.overlay import make_overlay

        return make_overlay(self.plan, self._run.folder / f"overlay-{self._number}")

    def _private_commands(self, holders: ExitStack) -> tuple[Command, ...]:
        """Return commands of engines on free ports; only turbofit has the engines' key."""
        run, config, plan = self._run, self._run.config, self.plan
        self.overlay = self._make_overlay()
        # The gateway opens its port later: no engine may take this port.
        public = None if config.gateway is None else config.gateway.port
        ports = free_ports(len(plan.groups), holders, besides=public)
        if plan.backend.of_lmdeploy:
            parsers = list(parser_options(plan.model, self.overlay, config.options))
            self.options += parsers
            if parsers and not self._number:
                words = shlex.join(parsers)
                run.say(f"set by the model's family: {words}; an option of yours replaces it")
        # In hexadecimal, no key begins with the dash of an option.
        self.key = secrets.token_hex(32)
        # Uncounted options may need the margin, so they leave an engine without a memory limit.
        held, name = not config.unplanned, config.client_name(plan.model)
        folder, plan = str(self.overlay), self._with_adapters()
        return private_commands(plan, ports, folder, name, self.options, held=held)

    def _launch(self, group: int, command: Command) -> Launch:
        """Return the launch of one group's engine, on real or on pretend GPUs."""
        run, plan = self._run, self.plan
        shared: dict[str, Any] = {
            # The user's own key is in the command already.
            "key": self.key or run.config.api_key,
            "group": group,
            "images": image_environment(plan),
            "spawn": None if run.standby is None else run.standby.spawn,
        }
        module = module_of(plan.backend)
        if run.config.pretend:
            from turbofit.serving.engine.pretend_launch import PretendLaunch

            server = module if plan.backend.on_torch else "turbofit.rehearsal.turbomind.server"
            folder, factor = run.folder / f"pretend-{self._number}", self.clock.factor
            return PretendLaunch(
                command, module_runner(server), plan=plan, folder=folder, factor=factor, **shared
            )
        runner = run.lmdeploy.argv if plan.backend.of_lmdeploy else module_runner(module)
        return Launch(command, runner, ratio=ratio_of(plan, group, run.fixed), **shared)


def ratio_of(plan: Plan, group: int, fixed: Options) -> Callable[[], float] | None:
    """Return a function that computes the cache ratio at each start of a group's engine.

    None if ``fixed``, the user's options, sets the ratio.
    """
    if plan.shares_cards:
        return partial(shared_ratio, plan, group)
    return None if "cache_max_entry_count" in fixed else partial(ratio_now, plan, group)
