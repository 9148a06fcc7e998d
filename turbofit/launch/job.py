"""What a run is told beside its plan: options, deadlines, who is told of its progress."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from turbofit.core.plan import Plan
    from turbofit.gateway.config import GatewayConfig
    from turbofit.launch.engine import Examiner, Timing
    from turbofit.launch.leases import Leases
    from turbofit.launch.record import Record

__all__ = ["Door", "Job"]


class Door(Protocol):
    """What lets a gateway on another machine reach engines, which are on private ports here."""

    key: str

    def open(self, plan: Plan, urls: list[str]) -> list[str]:
        """The engines of this plan are ready: where the gateway reaches them."""

    def close(self) -> None:
        """They are about to end."""


class Job:
    """What a run is told beside its plan.

    Args:
        folder: the run's.
        record: its record.
        say: takes lines of progress.
        on_open: called with the public addresses each time that the server opens.
        lmdeploy: LMDeploy's version.
        runner: the words that start it.
        timing: deadlines.
        leases: the machine's reservations.
        gateway: the public side, or None for engines without one.
        access: where records of requests go: a file, ``-`` for stderr, ``none``; None is the run's
            folder.
        port: without a gateway, the first engine's.
        key: without a gateway, the key that the user gave the engines.
        options: LMDeploy's own, passed on.
        name: what clients call the model, where the user says it.
        check: whether worst-case requests must be answered before the server opens.
        pretend: on pretend GPUs.
        taken: bytes that somebody takes of each pretend card once the cache is sized.
        fetch: brings a plan's weights onto this machine; None leaves that to LMDeploy.
        replan: plans again with changes; None where the plan was given.
        fixed: the planner's keywords that the user gave.
        changes: what the first plan was made with, as learned before.
        examiner: looks closer at the engines; they are on private ports then, with a key and
            without a gateway.
        door: stands where the gateway would, which is on another machine.
    """

    def __init__(
        self,
        *,
        folder: Path,
        record: Record,
        say: Callable[[str], None],
        on_open: Callable[[list[str]], None],
        lmdeploy: str,
        runner: tuple[str, ...],
        timing: Timing,
        leases: Leases,
        gateway: GatewayConfig | None,
        port: int,
        access: str | None = None,
        key: str | None = None,
        options: tuple[str, ...] = (),
        name: str | None = None,
        check: bool = True,
        pretend: bool = False,
        taken: int = 0,
        fetch: Callable[[Plan], Plan] | None = None,
        replan: Callable[[dict[str, Any]], Plan] | None = None,
        fixed: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        examiner: Examiner | None = None,
        door: Door | None = None,
    ) -> None:
        self.examiner, self.door = examiner, door
        self.folder, self.record, self.on_open = folder, record, on_open
        self._say = say
        self.lmdeploy, self.runner, self.timing, self.leases = lmdeploy, runner, timing, leases
        self.gateway, self.port, self.key, self.options = gateway, port, key, options
        self.access = access
        self.name, self.check, self.pretend, self.taken = name, check, pretend, taken
        self.fetch = fetch
        self.replan, self.fixed, self.changes = replan, dict(fixed or {}), dict(changes or {})

    def say(self, text: str) -> None:
        """Progress; a terminal or a disk that takes none costs the line, never the server."""
        with suppress(OSError, ValueError):
            self._say(text)
