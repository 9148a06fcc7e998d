"""One run: what it was asked for, where it is recorded, and who is told of its progress."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan
    from turbofit.gateway.http.app import Gateway
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.launch.engine.environment import Lmdeploy
    from turbofit.launch.engine.supervised_engine import Examiner
    from turbofit.launch.serve.config import ServeConfig
    from turbofit.launch.serve.leases import Leases
    from turbofit.launch.serve.record import Record
    from turbofit.launch.serve.shared_cards import SharedCards

__all__ = ["Job", "PublicSide"]

_Answer = TypeVar("_Answer")


class PublicSide(Protocol):
    """Where clients reach a plan's gateway: an address of its own, or a part of a shared one."""

    @property
    def url(self) -> str:
        """The address."""

    def start(self) -> None:
        """Begin to serve; returns once it does.

        Raises:
            LaunchError: it cannot.
        """

    def call(self, ask: Callable[[Gateway], _Answer]) -> _Answer:
        """Run something in the gateway's loop, and return what it returns.

        Raises:
            LaunchError: it does not serve.
        """

    @property
    def cut(self) -> int:
        """How many requests its end has cut off."""

    def stop(self, *, drain: bool = True) -> None:
        """Take nothing new, and end; what is under way may end with ``drain``."""

    def strike(self) -> None:
        """Cut off what is under way; safe in a signal handler."""


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
        publish: where clients reach a gateway; None is an address of its own.
        shared: the cards, where other models of this turbofit have engines on them.
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
        publish: Callable[[Gateway], PublicSide] | None = None,
        shared: SharedCards | None = None,
    ) -> None:
        self.config, self.folder, self.record, self.on_open = config, folder, record, on_open
        self._say, self.lmdeploy, self.leases = say, lmdeploy, leases
        self.fetch, self.replan, self.changes = fetch, replan, dict(changes or {})
        self.examiner, self.publish = examiner, publish
        self.shared = shared
        #: The gateway that serves now.
        self.front: PublicSide | None = None
        #: Who is suspected and refused; the next gateway goes on with it.
        self.deny_list: DenyList | None = None

    @property
    def fixed(self) -> Options:
        """What the user gave, by the fields of `PlanRequest`."""
        request = self.config.request
        return {} if request is None else request.given()

    def say(self, text: str) -> None:
        """Progress; a terminal or a disk that takes none costs the line, never the server."""
        with suppress(OSError, ValueError):
            self._say(text)
