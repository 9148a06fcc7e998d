"""All calls of Ray, by its public interface: the connection, nodes, tasks and actors.

No other module imports Ray (`tests/test_house.py`); this module imports Ray inside functions. Other
modules hold Ray's handles: ``handle.method.remote(...)`` calls an actor, and `outcomes` waits
for results.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from turbofit.core.cluster import Node
from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.core.messages import counted
from turbofit.core.process.interpreter import kept_stdout

#: Ray's namespaces for the actors of nodes and for held names; a name is unique in its namespace.
_NAMESPACE: Final = "turbofit"
_HELD: Final = "turbofit-held"
#: The port of a cluster's head, unless `ray start --port` gives another. Source: Ray's guide.
_PORT: Final = 6379
#: Seconds for a head to accept a connection; `ray.init` waits for more than a minute.
_CONNECT_SECONDS: Final = 3.0
#: Addresses that Ray looks up itself.
_OF_RAY: Final = ("auto", "local")
#: The most characters that a message repeats of an error of Ray; it becomes one line there.
_SHOWN: Final = 200
#: How often a process tries to hold a name, since Ray frees the name of a killed process late.
_TRIES: Final = 20
#: Seconds between two tries.
_PAUSE: Final = 0.5


@contextmanager
def connected(address: str | None) -> Iterator[str]:
    """Connect to a Ray cluster and yield its address; this process's tasks end with the connection.

    ``address`` None means ``RAY_ADDRESS``, or the cluster of this host. During the connection,
    prints to stdout go to stderr: Ray prints the death of a node to stdout, whatever
    ``log_to_driver`` is, and stdout is for the command's answer.

    Raises:
        PackageError: Ray is not installed.
        MachineError: no cluster answers at the address, or the text is no address.
        UsageError: the address is an address of Ray Client.
    """
    # Ray reads the variables at its import, so they are set before. A client sends its token only
    # in the mode "token"; a cluster without a token ignores the client's token.
    token = Path.home() / ".ray" / "auth_token"
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # A thread that still runs when the connection ends must not start another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # How often Ray tries to connect; a try with a server that is no head takes long.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    if find_spec("ray") is None:
        raise PackageError(
            "Ray is not installed here", hint=f"install it with {install_command('ray')}"
        )
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    if where.startswith("ray://"):
        raise UsageError(
            "Ray Client is not supported",
            hint="run turbofit on a node of the cluster, with --cluster ray",
        )
    if where not in _OF_RAY:
        where = _accepting(where)
    import ray

    with kept_stdout():
        try:
            ray.init(
                address=where, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR"
            )
        except (
            ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError,
        ) as exc:  # fmt: skip
            place = f" at {where}" if where != "auto" else " here"
            raise MachineError(
                f"no Ray cluster answers{place}: {str(exc)[:_SHOWN]}",
                hint="start a cluster with ray start --head, or write --cluster ray:HOST:6379; "
                "copy a cluster's token to ~/.ray/auth_token here, or name its file in "
                "RAY_AUTH_TOKEN_PATH",
            ) from None
        try:
            yield str(ray.get_runtime_context().gcs_address)
        finally:
            ray.shutdown()


def _accepting(address: str) -> str:
    """Return the address ``HOST:PORT`` of a head that accepts a connection.

    Raises:
        MachineError: nothing accepts a connection there, or the text is no address.
    """
    try:
        split = urlsplit(f"//{address}")
        host, port = split.hostname or "", split.port or _PORT
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as exc:
        raise MachineError(
            f"no Ray cluster answers at {address}: {str(exc)[:_SHOWN]}",
            hint=f"start its head with ray start --head --port {_PORT}, let this machine reach the"
            " port, and write --cluster ray:HOST:PORT",
        ) from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def nodes(address: str) -> dict[str, Node]:
    """Return the living nodes by id; ``why_not`` of a node says why the node can serve nothing.

    If this version of Ray does not show which GPUs jobs hold, all GPUs count as free.

    Raises:
        MachineError: the head does not answer, after half a minute.
    """
    import ray

    states: dict[str, Any] = {}
    try:
        with suppress(ImportError, AttributeError, TypeError):
            from ray.autoscaler.v2.sdk import get_cluster_status

            status = get_cluster_status(address)
            states = {node.node_id: node for node in (*status.active_nodes, *status.idle_nodes)}
        alive = [node for node in ray.nodes() if node["Alive"]]
    except Exception as exc:  # noqa: BLE001 - Ray raises any type when its head is gone
        raise MachineError(
            f"the Ray cluster at {address} does not answer: {str(exc)[:_SHOWN]}",
            hint="see ray status",
        ) from None
    found = {}
    for node in alive:
        identity, gpus = node["NodeID"], int(node["Resources"].get("GPU", 0))
        state = states.get(identity)
        held = 0 if state is None else int(state.used_resources().get("GPU", 0))
        why_not = f"jobs of Ray hold {held} of its {counted(gpus, 'GPU')}" if held else ""
        found[identity] = Node(
            id=identity,
            name=f"{node['NodeManagerHostname']}-{identity[:6]}",
            address=node["NodeManagerAddress"],
            gpus=gpus,
            leaving=state is not None and state.node_status == "DRAINING",
            why_not=why_not if gpus else "Ray counts no GPU there",
        )
    return found


def run_on(node: str, function: Callable[..., Any], *args: Any) -> Any:
    """Begin to run a function on a node, and return Ray's handle of the result.

    Ray reserves no CPU for the function.
    """
    import ray

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    return remote.options(scheduling_strategy=_on(node)).remote(*args)


def start_actor(kind: type, *args: Any, node: str, gpus: int, name: str) -> Any:
    """Start an actor on a node and return its handle.

    Ray restarts an actor that dies. The actor outlives this process; `kill_actor` ends an actor.
    """
    import ray

    remote = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=-1, lifetime="detached")(kind)
    return remote.options(scheduling_strategy=_on(node), name=name).remote(*args)


class _Holder:
    """An actor without methods; while the actor lives, no other process can have its name."""


def held_name(name: str) -> Any:
    """Hold a name in the cluster; return the holder's handle, None if another process has the name.

    The name is held until this process ends or drops the handle.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    holder = ray.remote(num_cpus=0, max_restarts=-1)(_Holder).options(
        name=name, namespace=_HELD, scheduling_strategy=_on(here)
    )
    for _ in range(_TRIES):
        with suppress(ValueError):
            return holder.remote()
        time.sleep(_PAUSE)
    return None


def _on(node: str) -> Any:
    """Return the scheduling strategy that places a task or an actor on the node with this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def kill_actor(actor: Any = None) -> None:
    """End an actor without a restart by Ray; None means the actor of this process."""
    import ray

    ray.kill(actor or ray.get_runtime_context().current_actor, no_restart=True)


def actors() -> dict[str, Any]:
    """Return all actors of turbofit, by name."""
    import ray

    found = {}
    for name in ray.util.list_named_actors():
        with suppress(ValueError):  # this actor has just ended
            found[name] = ray.get_actor(name)
    return found


def outcomes(refs: Sequence[Any], seconds: float) -> list[Any]:
    """Wait for calls, ``seconds`` in all; return each call's result, or Ray's error instead."""
    import ray

    end, found = time.monotonic() + seconds, list[Any]()
    for ref in refs:
        try:
            found.append(ray.get(ref, timeout=max(0.0, end - time.monotonic())))
        except ray.exceptions.RayError as exc:  # noqa: PERF203 - each call has an outcome
            found.append(exc)
    return found
