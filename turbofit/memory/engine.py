"""What planning asks of an engine: its account, what it refuses, what it reads and pins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Final

from turbofit.core.images import ImageRule
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, HostMemory, PlannedEngine, Settings
from turbofit.core.struct import Struct
from turbofit.memory.account import Account
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.vision_load import VisionLoad

__all__ = ["Engine", "WeightTraffic", "default_batch_size"]

#: LMDeploy's default batch by what is in the GPU's name (lmdeploy/utils.py).
_BATCH_BY_NAME: Final = {
    "a100": 384, "a800": 384, "h100": 1024, "h800": 1024, "l20y": 1024, "h200": 1024,
}  # fmt: skip
_BATCH: Final = 128
_PREFILL: Final = 8192
_RATIO: Final = 0.8


def default_batch_size(gpu_name: str) -> int:
    """LMDeploy's ``max_batch_size`` where none is given."""
    name = gpu_name.lower()
    return next((size for key, size in _BATCH_BY_NAME.items() if key in name), _BATCH)


class WeightTraffic(Struct):
    """Bytes of one rank's weights that a decode step reads, and that an image runs through."""

    decode: int
    vision: int


class Engine(ABC):
    """An engine in one generation.

    Args:
        version: one with presets, e.g. ``0.18``.
    """

    name: ClassVar[EngineName]
    #: Whether an image that chunked prefill cuts is encoded again in every chunk.
    encodes_again: ClassVar[bool] = False
    #: The options with which one engine runs on several nodes.
    options_over_nodes: ClassVar[Mapping[str, object]] = {}
    #: Why its account may not be right for the version that was asked for; None where it is.
    doubt: str | None = None

    def __init__(self, version: str) -> None:
        self.version = version

    @property
    def planned(self) -> PlannedEngine:
        """The engine as a plan names it."""
        return PlannedEngine(name=self.name, version=self.version)

    def check_options(self, fixed: Mapping[str, object]) -> None:  # noqa: B027 - most have all
        """Refuse options that every engine of LMDeploy has, and this one has not.

        Raises:
            UsageError: one is given.
        """

    def defaults(self, gpu_name: str) -> dict[str, object]:
        """What LMDeploy takes where nothing is given, on a GPU of this name."""
        return {
            "cache_max_entry_count": _RATIO,
            "max_batch_size": default_batch_size(gpu_name),
            "max_prefill_token_num": _PREFILL,
        }

    @abstractmethod
    def account(self, launch: EngineLaunch) -> Account:
        """Every byte of one engine."""

    @abstractmethod
    def tp_problem(self, model: Model, tp: int) -> str | None:
        """Why the engine would refuse this tensor-parallel degree; None where it would not."""

    @abstractmethod
    def problem(self, launch: EngineLaunch) -> str | None:
        """Why the engine would refuse these options, or die of them; None where it would not."""

    def missing_kernels(self, launch: EngineLaunch) -> str | None:  # noqa: ARG002
        """A sentence: what the engine has no code for on these cards; None where it has all."""
        return None

    @abstractmethod
    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """The most vision units that the engine can bring together in one forward, never under."""

    @abstractmethod
    def block_bytes(self, model: Model, settings: Settings) -> int:
        """Bytes per rank of one KV block."""

    @abstractmethod
    def traffic(self, model: Model, tp: int) -> WeightTraffic:
        """What one rank reads."""

    @abstractmethod
    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Host memory of one replica, in bytes, without what the machine has."""

    def warnings(self, settings: Settings) -> tuple[str, ...]:  # noqa: ARG002 - an engine's own
        """What a person should know before this engine runs with these settings."""
        return ()

    def communicator(self, settings: Settings) -> str:
        """How the GPUs of a group reach each other."""
        return settings.communicator

    @abstractmethod
    def prefill_words(self, settings: Settings) -> str:
        """What a person should know of ``max_prefill_token_num`` here."""
