"""TurboMind, as planning asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from turbofit.core.images import ImageRule
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, HostMemory, Settings
from turbofit.kernels.census import Census
from turbofit.kernels.released import released
from turbofit.memory import versions
from turbofit.memory.account import Account
from turbofit.memory.engine import Engine, WeightTraffic
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.turbomind import constraints
from turbofit.memory.turbomind.account import TurbomindAccount
from turbofit.memory.turbomind.bound import engine_bound
from turbofit.memory.turbomind.cache import block_bytes
from turbofit.memory.turbomind.constants import load_constants
from turbofit.memory.turbomind.kernels import missing_delta_kernels, missing_kernels
from turbofit.memory.turbomind.loading import host_memory
from turbofit.memory.turbomind.terms import warmup_tokens
from turbofit.memory.turbomind.weights import weight_classes
from turbofit.memory.vision_load import VisionLoad

__all__ = ["Turbomind"]


class Turbomind(Engine):
    """LMDeploy's C++ engine."""

    name: ClassVar[EngineName] = "turbomind"
    encodes_again: ClassVar[bool] = True
    exclusive_options: ClassVar[tuple[str, ...]] = ("communicator", "async_")
    options_over_nodes: ClassVar[Mapping[str, object]] = {"communicator": "nccl"}

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.constants = load_constants(version)

    def account(self, launch: EngineLaunch) -> Account:
        """See :meth:`Engine.account`."""
        return TurbomindAccount(launch, self.constants)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """See :meth:`Engine.tp_problem`."""
        return constraints.tp_problem(model, tp)

    def problem(self, launch: EngineLaunch) -> str | None:
        """See :meth:`Engine.problem`."""
        problem = constraints.settings_problem(launch.settings, self.constants)
        problem = problem or constraints.checkpoint_problem(launch)
        return problem or constraints.communicator_problem(launch)

    def missing_kernels(self, launch: EngineLaunch) -> str | None:
        """See :meth:`Engine.missing_kernels`."""
        found = missing_delta_kernels(launch, self.constants)
        if found is None:
            census = self.known_census(launch)
            found = None if census is None else missing_kernels(launch, census)
        return None if found is None else f"TurboMind of LMDeploy {self.version} has {found}"

    def known_census(self, launch: EngineLaunch) -> Census | None:
        """The kernels that it has: this machine has the engine that is installed."""
        if launch.machine.source == "nvml":
            from turbofit.kernels.installed import installed

            census = installed()
            if census is not None:
                return census
        return self.released_census()

    def released_census(self) -> Census | None:
        """The kernels of its version's wheel; None where it was not read."""
        version = versions.parse(self.version)
        return released(version) if version else None

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """See :meth:`Engine.units_bound`."""
        return engine_bound(rule, vision_load, settings)

    def block_bytes(self, model: Model, settings: Settings) -> int:
        """See :meth:`Engine.block_bytes`."""
        return block_bytes(model.text, settings)

    def traffic(self, model: Model, tp: int) -> WeightTraffic:
        """See :meth:`Engine.traffic`."""
        classes = weight_classes(model, tp, self.constants)
        vision = classes.pop("vision", 0) + classes.pop("projector", 0)
        return WeightTraffic(decode=sum(classes.values()) - classes["embedding"], vision=vision)

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """See :meth:`Engine.host_memory`."""
        return host_memory(model, settings, self.constants, units_per_forward=units_per_forward)

    def prefill_words(self, settings: Settings) -> str:
        """See :meth:`Engine.prefill_words`."""
        return f"LMDeploy warms up with {warmup_tokens(settings, self.constants)} tokens"
