"""What planning asks of an engine: its account, what it refuses, what it reads and pins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import ImageRule, Model
from turbofit.core.plan import HostMemory, Settings
from turbofit.core.struct import Struct
from turbofit.memory.account import Account
from turbofit.memory.exposure import Exposure

__all__ = ["Engine", "Traffic"]


class Traffic(Struct):
    """Bytes of one rank's weights that a decode step reads, and that an image runs through."""

    decode: int
    vision: int


class Engine(ABC):
    """An engine of LMDeploy in one generation."""

    name: ClassVar[Literal["turbomind", "pytorch"]]
    version: str

    @abstractmethod
    def account(
        self,
        model: Model,
        settings: Settings,
        gpus: Sequence[Gpu],
        machine: Machine,
        exposure: Exposure,
        margins: Sequence[int],
        free_at_cache: int | None = None,
    ) -> Account:
        """The account of one group.

        Args:
            model: the checkpoint.
            settings: the engine's options.
            gpus: the group's GPUs, the first one first.
            machine: for the links inside the group.
            exposure: what clients can ask of the vision tower.
            margins: bytes to leave free, one for each GPU.
            free_at_cache: free bytes when the cache is sized, as a log said.
        """

    @abstractmethod
    def tp_problem(self, model: Model, tp: int) -> str | None:
        """Why the engine would refuse this tensor-parallel degree; None where it would not."""

    @abstractmethod
    def settings_problem(self, settings: Settings) -> str | None:
        """Values that the engine refuses or dies of."""

    @abstractmethod
    def communicator_problem(
        self,
        model: Model,
        settings: Settings,
        exposure: Exposure,
        machine: Machine,
        gpus: Sequence[Gpu],
    ) -> str | None:
        """Why the communicator would not do in this group."""

    @abstractmethod
    def units_bound(self, rule: ImageRule, exposure: Exposure, settings: Settings) -> int:
        """The most vision units that the engine can bring together in one forward, never under."""

    @abstractmethod
    def block_bytes(self, model: Model, settings: Settings) -> int:
        """Bytes per rank of one KV block."""

    @abstractmethod
    def traffic(self, model: Model, tp: int) -> Traffic:
        """What one rank reads."""

    @abstractmethod
    def host_memory(
        self,
        model: Model,
        settings: Settings,
        *,
        units_per_forward: int,
        replicas: int,
        available: int | None,
    ) -> HostMemory:
        """Host memory of all replicas, in bytes."""

    @abstractmethod
    def prefill_words(self, settings: Settings) -> str:
        """What a person should know of ``max_prefill_token_num`` here."""
