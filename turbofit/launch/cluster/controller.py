"""`turbofit serve --cluster ray`: a node is a `turbofit serve`, kept by an actor; this is the loop.

It measures and plans, has each node's actor serve its plan, tells the front where nodes are, takes
in who joins and lets go who leaves. Its state is a file and what the actors say: killed and started
again within the servers' lease, it goes on with what still serves.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import deque
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan, ClusterStatus, Node, NodePlan, NodeStatus
from turbofit.core.errors import (
    DoesNotFitError,
    LaunchError,
    MachineError,
    OutOfMemoryError,
    TurbofitError,
    UsageError,
)
from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct
from turbofit.gateway.front import Front, NodeAddress
from turbofit.gateway.http.accesslog import access_log
from turbofit.gateway.server import digest_of
from turbofit.gateway.thread import GatewayThread
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.board import pin_board
from turbofit.launch.cluster.node import NodeActor, NodeTold
from turbofit.launch.cluster.nodes import held_only
from turbofit.launch.cluster.ray_adapter import client_context
from turbofit.launch.serve.detached import LEASE_SECONDS
from turbofit.planning.cluster import plan_cluster, plan_joining
from turbofit.planning.plan import doubled_margin

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Generator
    from pathlib import Path

    from turbofit.core.json_types import Document
    from turbofit.launch.cluster.ray_adapter import RayConnection, RayNode
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

__all__ = ["Controller", "NodeState", "serve_cluster"]

_TICK, _POST_SECONDS = 0.2, 1.0
#: Other fronts have so long to hear of a node that has changed before the next one does.
_FRONTS_TICKS: Final = 15
#: Seconds until an unfit node is tried again; sooner where it only has no free GPU.
_AGAIN_SECONDS: Final = 600.0
_NO_GPU_SECONDS: Final = 15.0
#: Seconds that the first plan waits until all nodes are measured; the others join later.
_MEASURE_SECONDS: Final = 180.0
_MOST_EVENTS: Final = 100
#: Seconds that servers have to end, beside those of the drain.
_LAST_SECONDS: Final = 20.0
#: Seconds that the end waits for an actor that does not answer: its server ends by its lease.
_SILENT_SECONDS: Final = 10.0
#: Seconds that even an urgent end waits: an actor must tell its server, which else serves on.
_URGENT_SECONDS: Final = 1.0
_DONE: Final = object()


class _Saved(Struct):
    """What the next controller needs to go on.

    The run's name, a digest of its request, what was changed since, what each node serves, and the
    ids of nodes that are to serve nothing. ``at`` is when, by a clock that nobody sets.
    """

    run: str
    at: float
    request: str
    changes: dict[str, Any]
    plan: ClusterPlan
    drained: tuple[str, ...] = ()


class NodeState:
    """One node and its state in this run."""

    def __init__(self, ray_node: RayNode) -> None:
        self.ray, self.state, self.why, self.again = ray_node, "joining", "", 0.0
        self.actor: Any = None
        self.gpus = 0
        #: What is awaited of the actor: how the node was measured, how it is.
        self.measuring: Any = None
        self.telling: Any = None
        self.node: Node | None = None
        self.plan: NodePlan | None = None
        self.margin: int | None = None
        self.digest, self.told = "", NodeTold()
        #: Why the actor does not answer: it starts again, or its node is gone.
        self.silent = ""

    @property
    def name(self) -> str:
        """What fronts and people call it."""
        return f"{self.ray.name}-{self.ray.id[:6]}"

    @property
    def open(self) -> bool:
        """Whether its planned server answers."""
        return self.told.state == "open" and self.told.digest == self.digest

    @property
    def failed(self) -> str:
        """Why the server of its plan cannot serve; empty where it can, or may."""
        told = self.told
        return told.why if told.state == "unfit" and told.digest == self.digest else ""

    def be(self, state: str, why: str = "", again: float = _AGAIN_SECONDS) -> None:
        """Change the state, with the reason, and try again after so many seconds."""
        self.state, self.why, self.again = state, why, time.monotonic() + again


class Controller:
    """All nodes of a run."""

    def __init__(
        self,
        connection: RayConnection,
        config: ClusterServeConfig,
        say: Callable[[str], None],
    ) -> None:
        self._connection, self._say, self.config = connection, say, config
        #: Whether the front sends requests to a node, or would.
        self.has_front: Callable[[NodeState], bool] = lambda _: True
        self.request: PlanRequest = config.request
        #: What `cluster change` has made another of the request.
        self.changes: Document = {}
        self.nodes: dict[str, NodeState] = {}
        self.run, self.change = secrets.token_hex(4), ""
        self._plan: ClusterPlan | None = None
        self.events: deque[str] = deque(maxlen=_MOST_EVENTS)
        self._changing: Generator[None, None, None] | None = None

    @property
    def plan(self) -> ClusterPlan:
        """What is served."""
        assert self._plan is not None
        return self._plan

    def say(self, text: str) -> None:
        """Tell people, and remember it."""
        self.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._say(text)

    def resume(self, saved: _Saved) -> None:
        """Go on with what an earlier controller has left."""
        self.run, self._plan, self.changes = saved.run, saved.plan, saved.changes
        self.request = self.request.changed(**saved.changes)
        for ray_node in self._connection.watched().values():
            planned = saved.plan.node(ray_node.id)
            if ray_node.id in saved.drained:
                node = self.nodes[ray_node.id] = NodeState(ray_node)
                node.be("drained")
            elif planned is not None and planned.plan is not None and not ray_node.leaving:
                node = self.nodes[ray_node.id] = NodeState(ray_node)
                node.node = Node(
                    id=ray_node.id, name=ray_node.name, address=ray_node.address,
                    machine=planned.plan.machine, pretend=self.config.pretend,
                )  # fmt: skip
                self._take(node, len(planned.gpus()))
                self.serve(node, planned)

    def begin(self, stopped: Callable[[], bool]) -> None:
        """Measure all nodes, and plan for them."""
        self._look()
        end = time.monotonic() + _MEASURE_SECONDS
        while any(n.measuring is not None for n in self.nodes.values()) and not stopped():
            if time.monotonic() > end:
                break
            self._hear()
            time.sleep(_TICK)
        known = [node.node or _unknown(node) for node in self.nodes.values()]
        source = f"ray {self._connection.address}"
        self._plan = plan_cluster(self.request, Cluster(source=source, nodes=tuple(known)))
        self.say(self.plan.verdict)
        for warning in self.plan.warnings:
            self._say(f"warning: {warning}")
        if not self.plan.fits:
            first = self.plan.remedies[0] if self.plan.remedies else None
            hint = f"{first.change}: {first.effect}" if first else "see turbofit plan --cluster"
            raise DoesNotFitError(self.plan.verdict, hint=hint)
        for node in self.nodes.values():
            if node.node is not None:
                self._settle(node, self.plan.node(node.ray.id))

    def tick(self) -> None:
        """One look at everything."""
        self._look()
        self._hear()
        for node in list(self.nodes.values()):
            self._step(node)
        if self._changing is not None and next(self._changing, _DONE) is _DONE:
            self._changing = None

    def _look(self) -> None:
        """Who has come, who is leaving, who has gone."""
        alive = self._connection.watched()
        for identity in self.nodes.keys() - alive.keys():
            gone = self.nodes.pop(identity)
            self.say(f"node {gone.name} has left the cluster")
        for identity, ray_node in alive.items():
            if identity not in self.nodes and not ray_node.leaving:
                node = self.nodes[identity] = NodeState(ray_node)
                self._join(node)
            elif ray_node.leaving and identity in self.nodes:
                self.drain(self.nodes[identity], "Ray drains it")

    def _join(self, node: NodeState) -> None:
        """Take a node's free GPUs, and measure it."""
        free = ray_adapter.free_gpus().get(node.ray.id, 0) if node.ray.gpus else 0
        if not free:
            why = "no GPU of it is free: jobs of Ray hold them all"
            node.be("unfit", why if node.ray.gpus else "Ray counts no GPU there", _NO_GPU_SECONDS)
            return
        node.be("joining")
        self._take(node, free)
        node.measuring = node.actor.measure.remote(self.config.pretend)

    def _take(self, node: NodeState, gpus: int) -> None:
        self._free(node)
        node.gpus = gpus
        node.actor = ray_adapter.start_actor(
            NodeActor, self.run, node.ray.id, node.ray.address, self.config.node_port,
            node=node.ray.id, calls=8, gpus=gpus,
        )  # fmt: skip

    def _free(self, node: NodeState) -> None:
        """Give a node's GPUs back."""
        if node.actor is not None:
            ray_adapter.kill_actor(node.actor)
        node.actor = node.telling = node.measuring = None
        node.gpus, node.told, node.digest = 0, NodeTold(), ""

    def _hear(self) -> None:
        """Take what actors have answered, and ask them again."""
        for node in self.nodes.values():
            if node.measuring is not None:
                self._hear_measured(node)
            elif node.actor is not None:
                if node.telling is None:
                    node.telling = node.actor.tell.remote()
                found, why = _answer(node.telling)
                if found is not None or why:
                    node.telling, node.silent = None, why
                node.told = found or node.told

    def _hear_measured(self, node: NodeState) -> None:
        found, why = _answer(node.measuring)
        if found is not None:
            node.measuring = None
            try:
                told = msgspec.json.decode(found[0], type=Node)
            except msgspec.MsgspecError as exc:  # another turbofit
                why = f"its turbofit answers otherwise: {exc}"
            else:
                told = replace(told, id=node.ray.id, address=node.ray.address)
                node.node = held_only(told, found[1])
        if why:
            self._unfit(node, f"it could not be measured: {why}")

    def _step(self, node: NodeState) -> None:
        """What follows from where a node stands."""
        if node.state == "joining" and node.measuring is None and node.node is not None:
            if self._plan is not None:
                self._settle(node, self._planned(node))
        elif node.state in ("starting", "serving"):
            if node.open and node.state == "starting":
                node.be("serving")
                self.say(f"node {node.name} serves at {node.told.url}")
            elif node.failed:
                self._failed(node)
        elif node.state == "draining" and node.told.state == "idle":
            self._free(node)
            node.be("drained", node.why)
            self.say(f"node {node.name} is drained, its GPUs are given back")
        elif node.state == "unfit" and time.monotonic() >= node.again:
            self._join(node)

    def _planned(self, node: NodeState) -> NodePlan:
        """A node's plan under the promise."""
        assert node.node is not None
        request = self.request
        if node.margin is not None:
            request = request.changed(margin=node.margin)
        try:
            return plan_joining(request, self.plan, node.node)
        except TurbofitError as exc:
            return NodePlan(
                node=node.ray.id, name=node.ray.name, address=node.ray.address, why_not=exc.message
            )

    def _settle(self, node: NodeState, planned: NodePlan | None) -> None:
        """Have a measured node serve its plan, or say why it cannot."""
        if planned is None or planned.plan is None:
            self._unfit(node, planned.why_not if planned else "it was not planned for")
        elif len(planned.gpus()) < node.gpus:
            # The cards that the plan leaves go back; which of them stay is Ray's to say.
            node.be("joining")
            self._take(node, len(planned.gpus()))
            node.node = None
            node.measuring = node.actor.measure.remote(self.config.pretend)
        else:
            self.serve(node, planned)

    def serve(self, node: NodeState, planned: NodePlan) -> None:
        """Have a node's actor serve a plan."""
        assert planned.plan is not None
        words = self.config.node_words
        digest = sha256(f"{digest_of(planned.plan)} {words}".encode()).hexdigest()[:16]
        node.plan, node.digest = planned, digest
        node.actor.serve.remote(digest, planned.plan.to_json(), words)
        node.told = replace(node.told, state="starting", digest=digest)
        node.telling = None
        if node.state != "changing":
            node.be("starting")

    def _failed(self, node: NodeState) -> None:
        """A node's server does not start, or has ended for good."""
        plan = node.plan and node.plan.plan
        if node.told.exit_code == OutOfMemoryError.exit_code and not node.margin and plan:
            node.margin = doubled_margin(plan)
            self.say(f"node {node.name} ran out of memory: it is planned with twice the margin")
            self._settle(node, self._planned(node))
        else:
            self._unfit(node, node.failed)

    def _unfit(self, node: NodeState, why: str) -> None:
        self._free(node)
        node.be("unfit", why)
        self.say(f"node {node.name} does not serve: {why}")

    def drain(self, node: NodeState, why: str = "") -> None:
        """Send a node nothing new, and end its server in order."""
        if node.state in ("draining", "drained"):
            return
        if node.actor is None:
            node.be("drained", why)
            return
        node.be("draining", why)
        node.actor.end.remote()
        self.say(f"node {node.name} finishes what it has")

    @property
    def changing(self) -> bool:
        """Whether a change of plan is under way."""
        return self._changing is not None

    def _changed(self, target: ClusterPlan, changes: Document) -> Generator[None, None, None]:
        """The steps from what is served to another plan of the same model.

        A node that the new plan leaves out is no failure; the first one that fails with the new
        plan brings the old one back on all that have changed, the last one first.
        """
        before, changes_before = self.plan, self.changes
        self._plan, self.changes = target, changes
        self.request = self.config.request.changed(**changes)
        self.say(f"a change of plan begins: {promise_of(before)} -> {promise_of(target)}")
        moved: list[tuple[NodeState, NodePlan | None]] = []
        serving = [node for node in self.nodes.values() if node.state in ("serving", "starting")]
        for number, node in enumerate(serving):
            self.change = f"{number} of {len(serving)} nodes have the new plan"
            moved.append((node, node.plan))
            yield from self._moved(node, target.node(node.ray.id))
            if not node.failed:
                continue
            why = f"node {node.name}: {node.failed}"
            self._plan, self.changes = before, changes_before
            self.request = self.config.request.changed(**changes_before)
            self.say(f"the new plan does not hold, going back: {why}")
            self.change = f"going back: {why}"
            for back, old in reversed(moved):
                yield from self._moved(back, old)
                if back.failed:
                    self._unfit(back, back.failed)
            self.change = f"given up: {why}"
            return
        for node in self.nodes.values():
            if node.state == "unfit":
                node.again = 0.0  # the new promise may be one that it keeps
        self.change = ""
        self.say(f"the plan has changed: {promise_of(target)}")

    def _moved(self, node: NodeState, planned: NodePlan | None) -> Generator[None, None, None]:
        """One node to its plan, until it serves or fails."""
        if node.ray.id not in self.nodes or node.state in ("draining", "drained"):
            return
        planned = planned if planned is not None and planned.plan is not None else None
        if planned is None and node.node is not None:
            planned = self._planned(node)
        if planned is None or planned.plan is None:
            self.drain(node)
            while node.ray.id in self.nodes and node.state == "draining":
                yield
            node.be("unfit", planned.why_not if planned is not None else "")
            return
        node.be("changing")
        yield  # the front hears of it before the server ends
        self.serve(node, planned)
        while node.ray.id in self.nodes and node.state == "changing":
            if node.failed:
                return
            if node.open and self.has_front(node):
                node.be("serving")
            yield
        for _ in range(_FRONTS_TICKS):
            yield

    def answer(self, question: Document) -> Document:
        """What another command is told; an error where it is refused, and nothing has changed."""
        try:
            return self._taken(question)
        except TurbofitError as exc:
            return exc.to_dict()

    def _taken(self, question: Document) -> Document:
        if question.get("kind") == "drain":
            node = self._named(str(question.get("node", "")))
            self.drain(node)
            return {"said": f"node {node.name} finishes what it has"}
        if question.get("kind") != "change":
            raise UsageError("nobody knows this question", hint="use one turbofit on all nodes")
        if self.changing:
            hint = "see turbofit cluster status, and wait"
            raise LaunchError("a change is under way already", hint=hint)
        changes = {**self.changes, **question.get("keywords", {})}
        request = self.config.request.changed(**changes)
        nodes = tuple(node.node or _unknown(node) for node in self.nodes.values())
        target = plan_cluster(request, Cluster(source=self.plan.source, nodes=nodes))
        if not target.fits:
            hint = "nothing has changed; see turbofit plan --cluster for what would fit"
            raise DoesNotFitError(target.verdict, hint=hint)
        self._changing = self._changed(target, changes)
        note = "node by node from here on; until the last one has changed, a request may meet"
        return {"said": f"{target.verdict}; {note} either plan's limits"}

    def _named(self, name: str) -> NodeState:
        """The node with this name, address or beginning of an id."""
        found = []
        for node in self.nodes.values() if name else ():
            names = (node.name, node.ray.name, node.ray.address)
            if name in names or node.ray.id.startswith(name):
                found.append(node)
        if len(found) != 1:
            many = f"{len(found)} nodes are" if found else "no node is"
            hint = "turbofit cluster status shows names and ids"
            raise UsageError(f"{many} {name!r}", hint=hint)
        return found[0]

    def addresses(self) -> tuple[NodeAddress, ...]:
        """Where fronts find nodes, with their keys."""
        return tuple(
            NodeAddress(
                name=node.name, url=node.told.url, key=node.told.key,
                draining=node.state not in ("serving", "starting"),
            )
            for node in self.nodes.values()
            if node.told.url
        )  # fmt: skip

    def status(self, url: str, front: Front) -> ClusterStatus:
        """All of it, for people."""
        found = []
        for node in self.nodes.values():
            seen = front.nodes.get(node.name)
            plan = node.plan.plan if node.plan is not None else None
            found.append(
                NodeStatus(
                    id=node.ray.id, name=node.name, address=node.ray.address,
                    state=node.state,  # type: ignore[arg-type]
                    cards=node.plan.cards if node.plan is not None else "",
                    why_not=node.why or node.failed, said=node.told.said, url=node.told.url,
                    up=seen is not None and seen.up, folder=node.told.folder,
                    outstanding=0 if seen is None else seen.outstanding,
                    at_once=0.0 if seen is None or not seen.up else seen.capacity,
                    tokens=plan.kv.total_tokens if plan is not None else 0,
                )
            )  # fmt: skip
        return ClusterStatus(
            name=self.config.name or self.plan.model.name, model=self.plan.model.name,
            source=self.plan.source, pretend=self.config.pretend,
            at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), urls=(url,), promise=promise_of(self.plan),
            nodes=tuple(found), change=self.change, events=tuple(self.events),
        )  # fmt: skip

    def saved(self) -> _Saved:
        """What each node serves now, for the next controller."""
        nodes = tuple(node.plan for node in self.nodes.values() if node.plan is not None)
        empty = ("draining", "drained")
        return _Saved(
            run=self.run, at=_since_boot(), request=_request_digest(self.config),
            changes=self.changes, plan=replace(self.plan, nodes=nodes),
            drained=tuple(key for key, node in self.nodes.items() if node.state in empty),
        )  # fmt: skip

    @property
    def hopeless(self) -> str:
        """Why nothing serves or will; empty where something does."""
        states = {node.state for node in self.nodes.values()}
        if states & {"joining", "starting", "serving", "changing", "draining"}:
            return ""
        return next((node.why for node in self.nodes.values() if node.state == "unfit"), "")

    def end(self, seconds: float, urgent: Callable[[], bool]) -> None:
        """End all servers in order, and give all GPUs back."""
        for node in self.nodes.values():
            if node.actor is not None:
                node.actor.end.remote()
        began = time.monotonic()
        while (took := time.monotonic() - began) < seconds:
            if urgent() and took > _URGENT_SECONDS:
                break
            self._hear()
            late = took > _SILENT_SECONDS
            open_ = [one for one in self.nodes.values() if one.actor and one.told.state != "idle"]
            if all(one.silent and late for one in open_):
                break
            time.sleep(_TICK)
        for node in self.nodes.values():
            self._free(node)


class _Run:
    """The controller, its front and its board, until a signal."""

    def __init__(
        self,
        controller: Controller,
        board: Any,
        folder: Path,
        on_open: Callable[[list[str]], None],
    ) -> None:
        self._controller, self._board, self._folder = controller, board, folder
        self._on_open, self._opened = on_open, False
        config = controller.config
        assert config.gateway is not None
        public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
        log = access_log(config.access_log or str(folder / "access.log"))
        self._front = GatewayThread(Front((), public, log, tls=client_context(os.environ)))
        controller.has_front = self._has
        self._followed: tuple[NodeAddress, ...] = ()
        self._inbox: Any = None
        self._answers: dict[int, Document] = {}
        self._posted = 0.0

    def follow(self, stop: StopSignal) -> signal.Signals:
        """Until a signal comes, or nothing is left to serve with."""
        controller, failed = self._controller, True
        self._front.start()
        try:
            while stop.signal is None:
                try:
                    controller.tick()
                except MachineError as exc:
                    self._outlive(exc, stop)
                addresses = controller.addresses()
                if addresses != self._followed:
                    self._front.call(partial(Front.follow, addresses=addresses))
                    self._followed = addresses
                if time.monotonic() - self._posted > _POST_SECONDS:
                    self._posted = time.monotonic()
                    self._post()
                if not self._opened and self._front.call(lambda front: front.health()["up"]):
                    self._opened = True
                    self._on_open([self._front.url])
                if why := controller.hopeless:
                    raise LaunchError(f"no node serves any more: {why}", hint="see the lines above")
                time.sleep(_TICK)
            failed = False
            return stop.signal
        finally:
            self._end(stop, failed=failed)

    def _has(self, node: NodeState) -> bool:
        def up(front: Front) -> bool:
            seen = front.nodes.get(node.name)
            return seen is not None and seen.up and seen.url == node.told.url

        return self._front.call(up)

    def _outlive(self, exc: MachineError, stop: StopSignal) -> None:
        """Ray's head is gone: nodes serve until their lease ends."""
        self._controller.say(
            f"warning: {exc.message}: nodes end in order within {LEASE_SECONDS:.0f} s"
        )
        while stop.signal is None and self._front.call(lambda front: front.health()["up"]):
            time.sleep(_TICK)
        if stop.signal is None:
            raise exc

    def _post(self) -> None:
        """Write the state, and take what is asked."""
        controller = self._controller
        status = self._front.call(lambda front: controller.status(self._front.url, front))
        with suppress(TurbofitError, OSError):  # a full disk costs the file
            text = msgspec.json.encode(controller.saved()).decode()
            write_atomic(self._folder / "cluster-state.json", text, mode=0o600)
        if self._inbox is not None:
            questions, why = _answer(self._inbox)
            if questions is None and not why:
                return  # it has not answered yet
            for number, question in (questions or {}).items():
                self._answers[number] = controller.answer(question)
        answers, self._answers = self._answers, {}
        self._inbox = self._board.post.remote(status, controller.addresses(), answers)

    def _end(self, stop: StopSignal, *, failed: bool) -> None:
        """Drain, stop, and leave nothing."""
        urgent = failed or stop.urgent
        stop.on_second(self._front.cut_off)
        if not urgent:
            self._controller.say("draining: what is under way may end")
        self._front.stop(drain=not urgent)
        if stop.signal is not None:
            self._controller.say(f"stopping: {stop.signal.name}")
        seconds = self._controller.config.timing.drain + _LAST_SECONDS
        with suppress(Exception):  # Ray may be gone: nodes end by their lease
            self._controller.end(seconds, lambda: stop.urgent)
        with suppress(OSError):
            (self._folder / "cluster-state.json").unlink()


def serve_cluster(
    config: ClusterServeConfig,
    stop: StopSignal,
    *,
    say: Callable[[str], None],
    on_open: Callable[[list[str]], None],
) -> signal.Signals:
    """Measure, plan, launch, and keep it until a signal ends it. Call it in the main thread."""

    def tell(text: str) -> None:
        with suppress(OSError, ValueError):
            say(text)

    with ray_adapter.connected(config.address) as connection:
        stop.rearm()  # Ray takes SIGTERM
        controller = Controller(connection, config, tell)
        name = config.name or _model_name(config)
        board = pin_board(name, connection.here)
        folder = state_dir("clusters") / "".join(c if c.isalnum() else "-" for c in name)
        folder.mkdir(mode=0o700, exist_ok=True)
        stop.abrupt = False
        saved = _saved(folder / "cluster-state.json", _request_digest(config))
        try:
            if saved is not None:
                controller.say("going on with what an earlier turbofit serve has left")
                controller.resume(saved)
            else:
                controller.begin(lambda: stop.signal is not None)
        except BaseException:
            controller.end(0.0, lambda: True)
            raise
        try:
            return _Run(controller, board, folder, on_open).follow(stop)
        finally:
            stop.abrupt = stop.signal is None


def _saved(path: Path, request: str) -> _Saved | None:
    """What an earlier controller of the same request has left while its servers' lease lasts."""
    with suppress(OSError, msgspec.MsgspecError):
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
        lasts = 0 <= _since_boot() - saved.at < LEASE_SECONDS
        if lasts and saved.request == request and saved.plan.fits:
            return saved
    return None


def _since_boot() -> float:
    """Seconds that this machine has been up, asleep too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _request_digest(config: ClusterServeConfig) -> str:
    """What tells requests apart, of which one controller may go on with what another has left."""
    given = {name: value for name, value in config.request.given().items() if name != "model"}
    parts = (_model_name(config), repr(sorted(given.items())), config.node_words)
    return sha256(repr(parts).encode()).hexdigest()


def _model_name(config: ClusterServeConfig) -> str:
    model = config.request.model
    return model if isinstance(model, str) else model.name


def promise_of(plan: ClusterPlan) -> str:
    """What requests are held to, in words."""
    limits, words = plan.limits, f"{plan.longest_request_tokens:,} tokens a request"
    if limits is None or limits.vision_unit is None:
        return words
    unit = f"{limits.vision_unit}{'' if limits.units_per_image == 1 else 's'}"
    images = f"{limits.images_per_request} of up to {limits.units_per_image:,} {unit}"
    return f"{words}, images: {images}"


def _unknown(node: NodeState) -> Node:
    """A node that was not measured."""
    why = node.why or "it was not measured in time"
    return Node(id=node.ray.id, name=node.ray.name, address=node.ray.address, why_not=why)


def _answer(ref: Any) -> tuple[Any, str]:
    """What a call of an actor gives, and why it gives nothing; neither: it has not yet."""
    try:
        return ray_adapter.result(ref, 0), ""
    except ray_adapter.ResultTimeoutError:
        return None, ""
    except ray_adapter.RayCallError as exc:
        return None, ray_adapter.one_line(exc)
