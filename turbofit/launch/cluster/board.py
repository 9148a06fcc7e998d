"""Where a run is found in a Ray cluster: what is served, where nodes are, what is asked of it."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError, UsageError, error_from
from turbofit.launch.cluster import ray_adapter

if TYPE_CHECKING:
    from turbofit.core.cluster import ClusterStatus
    from turbofit.core.json_types import Document
    from turbofit.gateway.front import NodeAddress
    from turbofit.launch.cluster.ray_adapter import Handle

    #: Where fronts reach the nodes, with their keys.
    Nodes = tuple[NodeAddress, ...]

_PREFIX: Final = "turbofit-run-"
#: Calls that the actor takes at once: questions wait in it.
_CALLS: Final = 32
_SECONDS: Final = 15.0


class Board:
    """The actor. Its controller writes it each second; whoever knows the name reads and asks."""

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Condition(), itertools.count()
        self._status: ClusterStatus | None = None
        self._nodes: Nodes = ()
        self._questions: dict[int, Document] = {}
        self._answers: dict[int, Document] = {}

    def post(
        self, status: ClusterStatus, nodes: Nodes, answers: dict[int, Document]
    ) -> dict[int, Document]:
        """Write it, and take what was asked since."""
        with self._lock:
            self._status, self._nodes = status, nodes
            self._answers |= answers
            self._lock.notify_all()
            questions, self._questions = self._questions, {}
            return questions

    def read(self) -> tuple[ClusterStatus | None, Nodes]:
        """What is served, and where fronts reach the nodes, with their keys."""
        return self._status, self._nodes

    def ask(self, question: Document, seconds: float) -> Document | None:
        """The controller's answer; None where it does not come in time."""
        with self._lock:
            number = next(self._numbers)
            self._questions[number] = question
            self._lock.wait_for(lambda: number in self._answers, seconds)
            return self._answers.pop(number, None)


def pin_board(name: str, node: str) -> Any:
    """The board of a run of this name, on the controller's node; another run may have the name.

    Where Ray starts it again it knows all after a second.
    """
    try:
        return ray_adapter.start_actor(Board, node=node, calls=_CALLS, name=_PREFIX + name)
    except ValueError:
        raise LaunchError(
            f"{name} is served on this cluster already",
            hint="turbofit cluster status shows it; --name gives this one another name",
        ) from None


def boards(name: str | None) -> dict[str, Handle]:
    """The boards of all runs, or of the one with this name.

    Raises:
        UsageError: there is none.
    """
    actors = ray_adapter.named_actors(_PREFIX)
    found = {run: board for run, board in actors.items() if name in (None, run)}
    if not found:
        what = "nothing" if name is None else f"no {name!r}"
        hint = "turbofit serve MODEL --cluster ray"
        raise UsageError(f"{what} is served on this cluster", hint=hint)
    return found


def one_board(name: str | None) -> Any:
    """The board of the run with this name, or of the only one."""
    found = boards(name)
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} models are served there", hint=f"--name: {', '.join(sorted(found))}"
        )
    return next(iter(found.values()))


def read(board: Any, seconds: float = _SECONDS) -> tuple[ClusterStatus | None, Nodes]:
    """What is served, None where nobody has told yet, and where its nodes are.

    Raises:
        LaunchError: the board does not answer.
    """
    found: tuple[ClusterStatus | None, Nodes] = _heard(board.read.remote(), seconds)
    return found


def ask(board: Any, question: Document, seconds: float = _SECONDS) -> Document:
    """What a run answers; raises what it refuses with."""
    told: Document = _heard(board.ask.remote(question, seconds), seconds + _SECONDS)
    if "error" in told:
        raise error_from(told["error"])
    return told


def _heard(ref: object, seconds: float) -> Any:
    told = ray_adapter.outcome(ref, seconds)
    if told is None or isinstance(told, ray_adapter.RayCallError):
        hint = "see the output of turbofit serve"
        raise LaunchError(f"no answer within {seconds:.0f} s", hint=hint)
    return told
