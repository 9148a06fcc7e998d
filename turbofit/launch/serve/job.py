"""One run: what it was asked for, where it is recorded, and who is told of its progress."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.thread import GatewayThread
    from turbofit.launch.engine.environment import Lmdeploy
    from turbofit.launch.engine.supervised_engine import Examiner
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.record import Record

__all__ = ["Job", "RemoteEndpoint"]


class RemoteEndpoint(Protocol):
    """What lets a gateway on another machine reach engines, which are on private ports here."""

    key: str

    def open(self, plan: Plan, urls: list[str]) -> list[str]:
        """The engines of this plan are ready: where the gateway reaches them."""

    def close(self) -> None:
        """They are about to end."""


class Job:
    """What a run has beside its plan.

    Args:
        config: what it was asked for.
        folder: the run's.
        record: its record.
        say: takes lines of progress.
        on_open: called with the public addresses each time that the server opens.
        lmdeploy: the LMDeploy that is started.
        leases: the machine's reservations.
        fetch: brings a plan's weights onto this machine; None leaves that to LMDeploy.
        replan: plans again with changes; None where the plan was given.
        changes: what the first plan was made with, as learned before.
        examiner: looks closer at the engines; they are on private ports then, with a key and
            without a gateway.
        door: stands where the gateway would, which is on another machine.
    """

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        config: ServeConfig,
        *,
        folder: Path,
        record: Record,
        say: Callable[[str], None],
        on_open: Callable[[list[str]], None],
        lmdeploy: Lmdeploy,
        leases: Leases,
        fetch: Callable[[Plan], Plan] | None = None,
        replan: Callable[[Options], Plan] | None = None,
        changes: Options | None = None,
        examiner: Examiner | None = None,
        door: RemoteEndpoint | None = None,
    ) -> None:
        self.config, self.folder, self.record, self.on_open = config, folder, record, on_open
        self._say, self.lmdeploy, self.leases = say, lmdeploy, leases
        self.fetch, self.replan, self.changes = fetch, replan, dict(changes or {})
        self.examiner, self.door = examiner, door
        #: The gateway that serves now.
        self.front: GatewayThread | None = None

    @property
    def fixed(self) -> Options:
        """What the user gave, by the fields of `PlanRequest`."""
        request = self.config.request
        return {} if request is None else request.given()

    def say(self, text: str) -> None:
        """Progress; a terminal or a disk that takes none costs the line, never the server."""
        with suppress(OSError, ValueError):
            self._say(text)
