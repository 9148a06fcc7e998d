"""All calls of Ray: its connection, nodes, tasks and actors.

No other module imports Ray (`tests/test_house.py`). Ray is imported inside the functions, so that a
module which imports this one needs no Ray. Others get Ray's handles: ``handle.method.remote(...)``
calls an actor, and `result` takes what that gives.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import MachineError, PackageError, UsageError
from turbofit.core.installation import install_command

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from turbofit.core.json_types import JsonObject

__all__ = [
    "ActorExistsError", "NodeLostError", "RayCallError", "ResultTimeoutError", "actor_names",
    "connect", "disconnect", "draining_nodes", "find_actor", "free_gpus", "gpus_of_this_task",
    "kill_actor", "nodes", "on_node", "one_line", "result", "start_actor", "start_task",
    "this_process", "wait_all",
]  # fmt: skip

#: Of Ray: names of actors are unique in it.
_NAMESPACE: Final = "turbofit"


class RayCallError(Exception):
    """A task or an actor gives no result; ``cause``: what the function raised there, if it ran."""

    def __init__(self, message: str, cause: object = None) -> None:
        super().__init__(message)
        self.cause = cause


class ResultTimeoutError(RayCallError):
    """There is no result yet."""


class ActorExistsError(RayCallError):
    """There is an actor of this name."""


class NodeLostError(RayCallError):
    """The node of the task left the cluster."""


def connect(address: str | None) -> None:
    """Connect this process to a cluster; None is ``RAY_ADDRESS``, or the cluster of this host.

    Raises:
        PackageError: Ray is not installed.
        MachineError: no cluster answers there.
        UsageError: an address of Ray Client.
    """
    _use_token()
    # What still runs in a thread when the connection ends must not begin another cluster.
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
    try:
        ray.init(address=where, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except ray.exceptions.AuthenticationError:
        raise MachineError(
            "the Ray cluster wants a token, and the one here is none or another",
            hint="copy its ~/.ray/auth_token to this host; RAY_AUTH_TOKEN_PATH names another file",
        ) from None
    except (ConnectionError, ValueError, RuntimeError) as exc:
        at = f" at {where}" if where != "auto" else " here"
        raise MachineError(
            f"no Ray cluster answers{at}: {one_line(exc)}",
            hint="start one with ray start --head, or write --cluster ray:HOST:6379; one that asks "
            "for a token wants its ~/.ray/auth_token here",
        ) from None


def disconnect() -> None:
    """End the connection, and with it what this process started in the cluster."""
    import ray

    ray.shutdown()


def this_process() -> tuple[str, str]:
    """The address of the cluster, and the id of this process's node."""
    import ray

    context = ray.get_runtime_context()
    return str(context.gcs_address), str(context.get_node_id())


def nodes() -> list[JsonObject]:
    """The nodes, as ``ray.nodes()`` gives them; raises anything while the head is gone."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()
    return found


def draining_nodes() -> frozenset[str]:
    """The ids of nodes that Ray drains, e.g. before a spot instance ends; as Ray Serve asks."""
    try:
        from ray._private import state

        found: Any = state.state.get_draining_nodes()
    except Exception:  # noqa: BLE001 - no public call: without it nodes just die
        return frozenset()
    return frozenset(found)


def free_gpus() -> dict[str, int]:
    """How many GPUs Ray counts free, by the node's id; none while its head is silent."""
    from ray._private.state import available_resources_per_node

    try:
        found = available_resources_per_node()
    except Exception:  # noqa: BLE001 - Ray raises any type when its head is gone
        return {}
    return {node: int(resources.get("GPU", 0)) for node, resources in found.items()}


def on_node(node: str) -> Any:
    """The scheduling strategy that places a task or an actor on the node of this id."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def start_task(function: Callable[..., Any], strategy: Any, *args: Any) -> Any:
    """Run a function on a node, once and without a CPU; the reference to its result."""
    import ray

    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    return remote.options(scheduling_strategy=strategy).remote(*args)


def start_actor(
    kind: type, *args: Any, strategy: Any, restarts: int, calls: int, gpus: int = 0, name: str = ""
) -> Any:
    """Start an actor, which Ray starts again so often (-1: always); its handle.

    ``calls`` are those that it takes at once, ``name`` is what others find it by.

    Raises:
        ActorExistsError: there is an actor of this name.
    """
    import ray

    taken = {"num_gpus": gpus} if gpus else {}
    remote = ray.remote(num_cpus=0, max_restarts=restarts, max_concurrency=calls, **taken)(kind)
    options = {"name": name, "namespace": _NAMESPACE} if name else {}
    try:
        return remote.options(scheduling_strategy=strategy, **options).remote(*args)
    except ValueError as exc:
        raise ActorExistsError(str(exc)) from None


def actor_names() -> list[str]:
    """The names of turbofit's actors in the cluster.

    Raises:
        MachineError: its head is silent; Ray waits for it for a minute.
    """
    import ray

    try:
        named = ray.util.list_named_actors(all_namespaces=True)
    except ray.exceptions.GetTimeoutError as exc:
        raise _silent(exc) from None
    return [one["name"] for one in named if one["namespace"] == _NAMESPACE]


def find_actor(name: str) -> Any | None:
    """The handle of turbofit's actor of this name; None where there is none.

    Raises:
        MachineError: the cluster's head is silent; Ray waits for it for a minute.
    """
    import ray

    try:
        return ray.get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        return None
    except ray.exceptions.GetTimeoutError as exc:
        raise _silent(exc) from None


def _silent(exc: Exception) -> MachineError:
    return MachineError(
        f"the head of the Ray cluster does not answer: {one_line(exc)}", hint="see ray status"
    )


def kill_actor(actor: Any) -> None:
    """End an actor for good."""
    import ray

    ray.kill(actor, no_restart=True)


def gpus_of_this_task() -> list[str]:
    """Ray's ids of the GPUs that the task has in which this runs."""
    import ray

    return [str(one) for one in ray.get_gpu_ids()]


def result(ref: Any, seconds: float) -> Any:
    """The result of a task or of an actor's method, within so many seconds.

    Raises:
        ResultTimeoutError: there is none yet.
        NodeLostError: the task's node left the cluster.
        RayCallError: anything else that Ray tells of, what the function raised too.
    """
    import ray

    kinds = ray.exceptions
    try:
        return ray.get(ref, timeout=seconds)
    except kinds.RayError as exc:
        kind = RayCallError
        if isinstance(exc, kinds.GetTimeoutError):
            kind = ResultTimeoutError
        elif isinstance(exc, kinds.TaskUnschedulableError | kinds.NodeDiedError):
            kind = NodeLostError
        raise kind(str(exc), getattr(exc, "cause", None)) from exc


def wait_all(refs: Collection[Any], seconds: float) -> None:
    """Wait until all have a result, for so long at most."""
    import ray

    ray.wait(list(refs), num_returns=len(refs), timeout=seconds)


def one_line(exc: BaseException) -> str:
    """What an exception says, in one line of 200 characters at most."""
    return " ".join(str(exc).split())[:200]


def _use_token() -> None:
    """Tell Ray that there is a token, as it reads the environment: before it is imported."""
    named = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    # `ray start` asks for a token where there is one, a client sends it only where it is told to. A
    # cluster without tokens ignores it.
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
