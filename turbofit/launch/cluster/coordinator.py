"""The Ray actor through which other commands reach a cluster that serves.

It owns no state: the process of `turbofit serve --cluster` writes what there is, and
takes what is asked. Ray starts it again where its process dies. It ends with that process.
"""

from __future__ import annotations

import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.struct import Struct
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.routing.routing_table import RoutingTable
from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turbofit.core.cluster import ClusterStatus
    from turbofit.core.json_types import Document

__all__ = [
    "SILENT_SECONDS",
    "Coordinator",
    "GatewayReport",
    "GatewayUpdate",
    "Inbox",
    "find_coordinators",
    "heard",
    "one_coordinator",
    "pin_coordinator",
]

_PREFIX: Final = "turbofit-coordinator-"
_CALLS: Final = 64
#: A gateway that was silent for so long is gone, in seconds: it has ended by itself before
#: (`extra_gateway._SILENT`, a poll and its end), so that it sends nothing when another has its
#: place, or when engines end that only it still knows.
SILENT_SECONDS: Final = 20.0


class GatewayReport(Struct):
    """What one more gateway tells: its address, and by engine the requests there and whether up.

    ``number`` is the routing table's that it follows.
    """

    address: str
    url: str = ""
    number: int = -1
    outstanding: dict[str, int] = msgspec.field(default_factory=dict)
    up: dict[str, bool] = msgspec.field(default_factory=dict)


class Inbox(Struct):
    """What came since the last look: questions by number, and the gateways that are there.

    ``routing_table`` is the number of the one that it has, -1 for none: Ray has started it again.
    """

    questions: tuple[tuple[int, dict[str, Any]], ...]
    gateways: dict[str, GatewayReport]
    routing_table: int


class GatewayUpdate(Struct):
    """What one more gateway is told; ``refused`` says why it may not be one."""

    refused: str = ""
    routing_table: RoutingTable | None = None
    config: GatewayConfig | None = None


class Coordinator:
    """Holds the newest of everything; every method returns at once, but those with ``seconds``.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._status: ClusterStatus | None = None
        self._routing_table: tuple[RoutingTable, GatewayConfig] | None = None
        self._places = 0
        self._gateways: dict[str, tuple[GatewayReport, float]] = {}
        self._questions: list[tuple[int, dict[str, Any]]] = []
        self._unanswered: set[int] = set()
        self._answers: dict[int, dict[str, Any]] = {}
        #: Above all numbers of an earlier process of this actor, whose answers may still come.
        self._number = time.time_ns()

    def write(
        self,
        status: ClusterStatus,
        routing_table: RoutingTable | None,
        config: GatewayConfig,
        places: int,
        known: Mapping[str, GatewayReport] = MappingProxyType({}),
    ) -> Inbox:
        """From the process that serves: what there is, and how many more gateways may come.

        ``routing_table`` is None where it is the one that was written last: it may be megabytes.
        ``known`` are the gateways that were there: a coordinator that Ray has started again keeps
        their places.
        """
        with self._changed:
            self._status, self._places = status, places
            now = self._clock()
            if routing_table is not None:
                if self._routing_table is None:
                    before = {name: (seen, now) for name, seen in known.items()}
                    self._gateways = before | self._gateways
                self._routing_table = routing_table, config
            self._gateways = {
                name: (seen, at)
                for name, (seen, at) in self._gateways.items()
                if now - at < SILENT_SECONDS
            }
            questions, self._questions = tuple(self._questions), []
            self._changed.notify_all()
            return Inbox(
                questions=questions,
                gateways={name: seen for name, (seen, _) in self._gateways.items()},
                routing_table=-1 if self._routing_table is None else self._routing_table[0].number,
            )

    def answer(self, number: int, document: Document) -> None:
        """To a question: ``error`` in it where it was refused. Nobody may wait for it any more."""
        with self._changed:
            if number in self._unanswered:
                self._answers[number] = document
                self._changed.notify_all()

    def status(self) -> ClusterStatus | None:
        """The newest, None before the first."""
        return self._status

    def ask(self, document: Document, seconds: float) -> Document | None:
        """A question to the process that serves, and its answer; None where none came in time.

        A question that was not taken by then is withdrawn, so that it has no effect later.
        """
        with self._changed:
            self._number += 1
            number = self._number
            self._unanswered.add(number)
            self._questions.append((number, document))
            self._changed.wait_for(lambda: number in self._answers, seconds)
            self._unanswered.remove(number)
            self._questions = [one for one in self._questions if one[0] != number]
            return self._answers.pop(number, None)

    def poll(self, name: str, seen: GatewayReport, since: int, seconds: float) -> GatewayUpdate:
        """From one more gateway: that it is there; a routing table that is newer than ``since``."""
        with self._changed:
            if self._full(name):
                return self._refused()
            self._gateways[name] = (seen, self._clock())
            self._changed.wait_for(
                lambda: self._routing_table is not None and self._routing_table[0].number > since,
                seconds,
            )
            if self._full(name):  # how many there may be was told meanwhile
                self._gateways.pop(name, None)
                return self._refused()
            routing_table, config = self._routing_table or (None, None)
            return GatewayUpdate(routing_table=routing_table, config=config)

    def _full(self, name: str) -> bool:
        """Whether others that came before a gateway have all places; unknown is not full."""
        names = list(self._gateways)
        before = names.index(name) if name in names else len(names)
        return self._routing_table is not None and before >= self._places

    def _refused(self) -> GatewayUpdate:
        return GatewayUpdate(
            refused=f"as many gateways are there as were planned for: {self._places + 1}"
        )

    def leave(self, name: str) -> None:
        """A gateway ends."""
        with self._changed:
            self._gateways.pop(name, None)


def pin_coordinator(name: str, node: str) -> Any:
    """Start the coordinator of a model that is served; its handle.

    Args:
        name: what people call it.
        node: the id of the node of the process that serves.

    Raises:
        LaunchError: another process serves under this name.
    """
    options = ray_adapter.on_node(node)
    try:
        return ray_adapter.start_actor(
            Coordinator, strategy=options, restarts=-1, calls=_CALLS, name=_PREFIX + name
        )
    except ray_adapter.ActorExistsError:
        raise LaunchError(
            f"{name} is served on this cluster already",
            hint="see turbofit cluster status, or choose another --name",
        ) from None


def find_coordinators(name: str | None = None) -> Document:
    """The coordinators on the cluster that this process is connected to, by what people call them.

    Raises:
        UsageError: none of this name.
    """
    names = sorted(
        one.removeprefix(_PREFIX) for one in ray_adapter.actor_names() if one.startswith(_PREFIX)
    )
    if name is not None:
        if name not in names:
            raise UsageError(
                f"nothing is served as {name} on this cluster",
                hint=f"there is {', '.join(names)}"
                if names
                else "turbofit serve MODEL --cluster ray",
            )
        names = [name]
    coordinators = {one: ray_adapter.find_actor(_PREFIX + one) for one in names}
    # None: it has just ended.
    return {
        one: coordinator for one, coordinator in coordinators.items() if coordinator is not None
    }


def one_coordinator(name: str | None, hint: str) -> Any:
    """The coordinator of this name, or the only one.

    Args:
        name: what people call it.
        hint: what to do where nothing is served.

    Raises:
        UsageError: there is none, or which one is meant is not said.
    """
    coordinators = find_coordinators(name)
    if len(coordinators) != 1:
        raise UsageError(
            f"{len(coordinators) or 'no'} models are served on this cluster",
            hint=f"--name is one of {', '.join(coordinators)}" if coordinators else hint,
        )
    (coordinator,) = coordinators.values()
    return coordinator


def heard(ref: Any, seconds: float) -> Any:
    """The result of a call to a coordinator.

    Raises:
        LaunchError: it does not, or what serves has ended.
    """
    try:
        return ray_adapter.result(ref, seconds)
    except ray_adapter.ResultTimeoutError:
        why = f"no answer within {seconds:.0f} s"
    except ray_adapter.RayCallError as exc:
        why = f"what was served has ended: {ray_adapter.one_line(exc)}"
    raise LaunchError(why, hint="see the output of turbofit serve --cluster")
