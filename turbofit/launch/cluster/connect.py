"""The connection to a Ray cluster, and who is in it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.log import LazyLogger
from turbofit.core.struct import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["NAMESPACE", "Alive", "Connection", "connected"]

_LOG: Final = LazyLogger(__name__)

#: Of Ray: names of actors are unique in it.
NAMESPACE: Final = "turbofit"


#: A head that is silent for so long is gone; Ray itself ends all its processes after 60 s.
_SILENT: Final = 45.0
_LOOK_SECONDS: Final = 1.0


class Alive(Struct):
    """A node that Ray has; ``gpus`` as Ray counts them; ``leaving``: it is being drained."""

    id: str
    name: str
    address: str
    gpus: int
    leaving: bool = False


class Connection:
    """A cluster that this process is connected to.

    ``address`` is the cluster's, ``here`` this node's id and ``here_address`` its address.
    """

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        self.address = str(context.gcs_address)
        self.here = str(context.get_node_id())
        self.here_address = str(ray.util.get_node_ip_address())
        self._watch: _Watch | None = None

    def watched(self) -> dict[str, Alive]:
        """The nodes that were there when the head was last heard of, a second ago; never waits.

        Raises:
            MachineError: the cluster's head does not answer any more.
        """
        if self._watch is None:
            self._watch = _Watch(self.alive)
            self._watch.start()
        return self._watch.seen()

    def alive(self) -> dict[str, Alive]:
        """The nodes that are there now, by id.

        Raises:
            MachineError: the cluster's head does not answer.
        """
        import ray

        try:
            nodes = ray.nodes()
        except Exception as exc:  # noqa: BLE001 - Ray raises what it likes when its head is gone
            raise MachineError(
                f"the Ray cluster at {self.address} does not answer: {_line(exc)}",
                hint="see ray status; engines end with the cluster",
            ) from None
        leaving = _leaving()
        return {
            node["NodeID"]: Alive(
                id=node["NodeID"],
                name=node.get("NodeManagerHostname") or node["NodeName"],
                address=node["NodeManagerAddress"],
                gpus=int(node["Resources"].get("GPU", 0)),
                leaving=node["NodeID"] in leaving,
            )
            for node in nodes
            if node["Alive"]
        }


class _Watch(threading.Thread):
    """Looks at the nodes in a thread of its own: while the head is gone, Ray does not return."""

    def __init__(self, look: Callable[[], dict[str, Alive]]) -> None:
        super().__init__(name="alive", daemon=True)
        self._look = look
        self._seen, self._at = look(), time.monotonic()
        self._error: MachineError | None = None

    def seen(self) -> dict[str, Alive]:
        """The last answer.

        Raises:
            MachineError: there was none for long.
        """
        silent = time.monotonic() - self._at
        if silent > _SILENT:
            raise self._error or MachineError(
                f"the head of the Ray cluster has been silent for {silent:.0f} s",
                hint="see ray status; engines end with the cluster",
            )
        return self._seen

    def run(self) -> None:
        """As long as the process."""
        while True:
            time.sleep(_LOOK_SECONDS)
            try:
                self._seen, self._error = self._look(), None
                self._at = time.monotonic()
            except MachineError as exc:
                self._error = exc


@contextmanager
def connected(address: str | None) -> Iterator[Connection]:
    """Be connected to a cluster; what this process started there ends with the connection.

    Args:
        address: as ``ray start`` prints it; None is ``RAY_ADDRESS``, or the cluster of this host.

    Raises:
        PackageError: Ray is not installed.
        MachineError: no cluster answers there.
        UsageError: an address of Ray Client.
    """
    _token()
    # What still runs in a thread when the connection ends must not begin another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        import ray
    except ImportError:
        raise PackageError(
            "Ray is not installed here", hint='install it with pip install "turbofit[ray]"'
        ) from None
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where.startswith("ray://"):
        raise UsageError(
            "Ray Client does not do: what serves must be on a node of the cluster",
            hint="run turbofit on a node, with --cluster ray",
        )
    try:
        ray.init(
            address=where,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=True,
            logging_level="ERROR",
        )
    except ray.exceptions.AuthenticationError:
        raise MachineError(
            "the Ray cluster wants a token, and the one here is none or another",
            hint="copy its ~/.ray/auth_token to this host; RAY_AUTH_TOKEN_PATH names another file",
        ) from None
    except (ConnectionError, ValueError, RuntimeError) as exc:
        raise MachineError(
            f"no Ray cluster answers{f' at {where}' if where != 'auto' else ' here'}: {_line(exc)}",
            hint="start one with ray start --head, or write --cluster ray:HOST:6379; one that asks "
            "for a token wants its ~/.ray/auth_token here",
        ) from None
    _LOG.info("connected to Ray at %s", where)
    try:
        yield Connection()
    finally:
        ray.shutdown()


def _token() -> None:
    """What Ray reads from the environment before it is imported: that there is a token."""
    named = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    # `ray start` asks for a token where there is one, a client sends it only where it is told to. A
    # cluster without tokens takes no offence.
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _leaving() -> frozenset[str]:
    """Nodes that Ray drains, e.g. before a spot instance ends; Ray Serve asks in the same way."""
    try:
        from ray._private import state

        found: Any = state.state.get_draining_nodes()
    except Exception:  # noqa: BLE001 - it is no public call: without it they just die
        return frozenset()
    return frozenset(found)


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200]
