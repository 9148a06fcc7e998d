"""All calls of Ray: its connection, nodes, tasks and actors.

No other module imports Ray (`tests/test_house.py`), and this one only inside its functions. Other
modules hold Ray's handles: ``handle.method.remote(...)`` calls an actor, and `outcome` waits for
the result.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.cluster import Node
from turbofit.core.errors import LaunchError, MachineError, PackageError, UsageError, error_from
from turbofit.core.installation import install_command
from turbofit.core.process.stdout import kept_stdout

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from turbofit.core.cluster import ClusterStatus
    from turbofit.core.json_types import Document
    from turbofit.gateway.front import NodeAddress

    #: A handle of an actor, and a function's result or a `RayCallError`.
    Handle = Any
    Result = Any
    #: The status, None until the controller has posted one, and the nodes' addresses with keys.
    Page = tuple[ClusterStatus | None, tuple[NodeAddress, ...]]

#: Ray's namespace, in which names of actors are unique.
_NAMESPACE: Final = "turbofit"
#: A head that is silent for so many seconds is gone; Ray ends all its processes after 60 s.
_SILENT: Final = 45.0
#: Exceptions of Ray if no cluster answers.
_NOT_THERE: Final = (ConnectionError, ValueError, RuntimeError)
_LOOK_SECONDS: Final = 1.0
#: Calls that a run's board handles at once: questions wait in it.
_CALLS: Final = 32
_SECONDS: Final = 15.0


class RayCallError(Exception):
    """A task or an actor gave no result."""


class RayConnection:
    """The cluster that this process is connected to; ``here`` is this node's id."""

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        self.address, self.here = str(context.gcs_address), str(context.get_node_id())
        self._seen: dict[str, Node] = {}
        self._at, self._error = 0.0, ""

    def watched(self) -> dict[str, Node]:
        """The nodes that were there when the head last answered, about a second ago.

        It never waits: a thread asks, since Ray does not return while the head is gone.

        Raises:
            MachineError: the cluster's head does not answer any more.
        """
        if not self._at:
            self._seen, self._at = self.alive(), time.monotonic()
            threading.Thread(target=self._look, name="alive", daemon=True).start()
        silent = time.monotonic() - self._at
        if silent > _SILENT:
            raise MachineError(
                self._error or f"the head of the Ray cluster has been silent for {silent:.0f} s",
                hint="see ray status",
            )
        return self._seen

    def alive(self) -> dict[str, Node]:
        """The nodes that are there now, by id; a `MachineError` if the head does not answer."""
        import ray

        try:
            nodes: list[dict[str, Any]] = ray.nodes()
        except Exception as exc:  # noqa: BLE001 - Ray raises any type when its head is gone
            raise MachineError(
                f"the Ray cluster at {self.address} does not answer: {_one_line(exc)}",
                hint="see ray status",
            ) from None
        leaving, free = (), {}
        with suppress(Exception):  # no public calls
            from ray._private import state

            free = state.available_resources_per_node()
            # Nodes that Ray drains, e.g. before a spot instance ends; Ray Serve reads them like
            # this.
            leaving = state.state.get_draining_nodes()
        return {
            node["NodeID"]: Node(
                id=node["NodeID"],
                name=node.get("NodeManagerHostname") or node["NodeName"],
                address=node["NodeManagerAddress"],
                gpus=int(node["Resources"].get("GPU", 0)),
                free=int(free.get(node["NodeID"], {}).get("GPU", 0)),
                leaving=node["NodeID"] in leaving,
            )
            for node in nodes
            if node["Alive"]
        }

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self._seen, self._at, self._error = self.alive(), time.monotonic(), ""
            except MachineError as exc:
                self._error = exc.message


@contextmanager
def connected(address: str | None) -> Iterator[RayConnection]:
    """Connect to a cluster; everything that this process started there ends with the connection.

    ``address`` None is ``RAY_ADDRESS``, or the cluster of this host. Ray prints to stdout that a
    node has died, whatever ``log_to_driver`` says, so stdout is kept for the answer.

    Raises:
        PackageError: Ray is not installed.
        MachineError: no cluster answers there.
        UsageError: the address is one of Ray Client.
    """
    # Ray reads these when it is imported. `ray start` asks for a token if there is one, a client
    # sends it only if it is configured to. A cluster without tokens ignores it.
    named = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # A thread that still runs when the connection ends must not start another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        import ray
    except ImportError:
        how = install_command("ray")
        raise PackageError("Ray is not installed here", hint=f"install it with {how}") from None
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where.startswith("ray://"):
        raise UsageError(
            "Ray Client does not do: what serves must be on a node of the cluster",
            hint="run turbofit on a node, with --cluster ray",
        )
    with kept_stdout():
        try:
            ray.init(
                address=where, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR"
            )
        except (*_NOT_THERE, ray.exceptions.AuthenticationError) as exc:
            at = f" at {where}" if where != "auto" else " here"
            raise MachineError(
                f"no Ray cluster answers{at}: {_one_line(exc)}",
                hint="start one with ray start --head, or write --cluster ray:HOST:6379; one that "
                "asks for a token wants its ~/.ray/auth_token here (RAY_AUTH_TOKEN_PATH: another "
                "file)",
            ) from None
        try:
            yield RayConnection()
        finally:
            ray.shutdown()


def run_on_each(
    nodes: Iterable[str], function: Callable[[], Any], seconds: float
) -> dict[str, Result]:
    """Run a function on each node, without a CPU; returns its results or `RayCallError`s by id."""
    import ray

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = {node: remote.options(scheduling_strategy=_on(node)).remote() for node in nodes}
    end, late = time.monotonic() + seconds, RayCallError(f"no answer within {seconds:.0f} s")
    return {
        node: outcome(ref, max(0.1, end - time.monotonic())) or late for node, ref in refs.items()
    }


def _on(node: str) -> Any:
    """The scheduling strategy that places a task or an actor on the node with this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def start_actor(
    kind: type, *args: Any, node: str, calls: int = 1, gpus: int = 0, name: str | None = None
) -> Any:
    """Start an actor on a node, which Ray restarts whenever it ends; returns its handle.

    ``calls``: how many it handles at once; ``name``: the name by which others find it.

    Raises:
        ValueError: there is an actor of this name.
    """
    import ray

    taken = {"num_gpus": gpus} if gpus else {}
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=calls, **taken)(kind)
    return remote.options(scheduling_strategy=_on(node), name=name).remote(*args)


def kill_actor(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)


def gpus_of_this_task() -> list[str]:
    """Ray's ids of the GPUs that the current task has."""
    import ray

    return [str(gpu) for gpu in ray.get_gpu_ids()]


def outcome(ref: Any, seconds: float) -> Any:
    """A call's result or its `RayCallError`; None if neither comes within ``seconds``."""
    import ray

    try:
        return ray.get(ref, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as exc:
        return RayCallError(str(exc))


def _one_line(exc: BaseException) -> str:
    """An exception's text, in one line of at most 200 characters."""
    return " ".join(str(exc).split())[:200]


def server_words(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Options for a node's server to use Ray's certificate, if Ray uses TLS; else empty.

    If Ray's traffic uses TLS, so does that between fronts and nodes, with the same certificates:
    Ray reads them from variables that every node must have (``RAY_USE_TLS`` and three files).
    """
    if not _uses_tls(environ):
        return ()
    certificate, key = environ.get("RAY_TLS_SERVER_CERT", ""), environ.get("RAY_TLS_SERVER_KEY", "")
    return ("--ssl-certfile", certificate, "--ssl-keyfile", key)


def client_context(environ: Mapping[str, str]) -> ssl.SSLContext | None:
    """The TLS context by which a front verifies nodes; None if Ray uses no TLS.

    A node has a certificate of Ray's authority that names its address, as Ray itself demands.

    Raises:
        LaunchError: Ray uses TLS, and its authority's certificate cannot be used.
    """
    if not _uses_tls(environ):
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=environ.get("RAY_TLS_CA_CERT", ""))
    except OSError as exc:
        raise LaunchError(
            f"RAY_USE_TLS is set, but the certificate of its authority cannot be used: {exc}",
            hint="check RAY_TLS_CA_CERT on this node",
        ) from None


def _uses_tls(environ: Mapping[str, str]) -> bool:
    return environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


class Board:
    """The actor of a run that publishes its status and nodes' addresses, and takes questions.

    The controller writes it each second; every process that knows its name can read and ask.
    """

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Condition(), itertools.count()
        self._page: Page = (None, ())
        self._questions: dict[int, Document] = {}
        self._answers: dict[int, Document] = {}

    def post(self, page: Page, answers: dict[int, Document]) -> dict[int, Document]:
        """Publish a page and answers; returns the questions since the last call."""
        with self._lock:
            self._page = page
            self._answers |= answers
            self._lock.notify_all()
            questions, self._questions = self._questions, {}
            return questions

    def read(self) -> Page:
        return self._page

    def ask(self, question: Document, seconds: float) -> Document | None:
        """The controller's answer; None if it does not come within ``seconds``."""
        with self._lock:
            number = next(self._numbers)
            self._questions[number] = question
            self._lock.wait_for(lambda: number in self._answers, seconds)
            return self._answers.pop(number, None)


def pin_board(name: str, node: str) -> Any:
    """Start a run's board on the controller's node, by a name that another run may have.

    Raises:
        LaunchError: another run on this cluster has this name.
    """
    try:
        return start_actor(Board, node=node, calls=_CALLS, name=name)
    except ValueError:
        raise LaunchError(
            f"{name} is served on this cluster already",
            hint="turbofit cluster status shows it; --name gives this one another name",
        ) from None


def boards(name: str | None) -> dict[str, Handle]:
    """The boards of all runs, or of the run with this name: only boards are named actors.

    Raises:
        UsageError: there is no such run.
        MachineError: the cluster's head does not answer, for which Ray waits a minute.
    """
    import ray

    try:
        runs = [run for run in ray.util.list_named_actors() if name in (None, run)]
    except ray.exceptions.GetTimeoutError as exc:
        raise MachineError(
            f"the head of the Ray cluster does not answer: {_one_line(exc)}", hint="see ray status"
        ) from None
    named = {}
    for run in runs:
        with suppress(ValueError):  # it has just ended
            named[run] = ray.get_actor(run)
    if not named:
        what = "nothing" if name is None else f"no {name!r}"
        hint = "turbofit serve MODEL --cluster ray"
        raise UsageError(f"{what} is served on this cluster", hint=hint)
    return named


def one_board(name: str | None) -> Any:
    """The board of the run with this name, or of the only one.

    Raises:
        UsageError: no run has this name, or several run and none is named.
    """
    runs = boards(name)
    if len(runs) > 1:
        raise UsageError(
            f"{len(runs)} models are served there", hint=f"--name: {', '.join(sorted(runs))}"
        )
    return next(iter(runs.values()))


def read(board: Any, seconds: float = _SECONDS) -> Page:
    """The published status and addresses; a `LaunchError` if the board does not answer."""
    page: Page = _answer(board.read.remote(), seconds)
    return page


def ask(board: Any, question: Document, seconds: float = _SECONDS) -> Document:
    """The controller's answer to a question.

    Raises:
        TurbofitError: the run refuses, or does not answer in time.
    """
    answer: Document = _answer(board.ask.remote(question, seconds), seconds + _SECONDS)
    if "error" in answer:
        raise error_from(answer["error"])
    return answer


def _answer(ref: object, seconds: float) -> Any:
    answer = outcome(ref, seconds)
    if answer is None or isinstance(answer, RayCallError):
        hint = "see the output of turbofit serve"
        raise LaunchError(f"no answer within {seconds:.0f} s", hint=hint)
    return answer
