"""The controller of `turbofit serve --cluster ray`; each node is a `turbofit serve` of an actor.

It measures and plans, has each node's actor serve its plan, tells the front the nodes' addresses,
plans for nodes that join, and forgets those that leave. Its state is a file and the actors'
reports: a controller that is killed and restarted within the servers' lease continues with what
still serves.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from math import inf
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import Cluster, ClusterPlan, ClusterStatus, Node, NodePlan, NodeStatus
from turbofit.core.errors import (
    DoesNotFitError,
    LaunchError,
    OutOfMemoryError,
    TurbofitError,
    UsageError,
)
from turbofit.core.messages import BESIDE_COMMANDS
from turbofit.core.process.files import StateFile, state_dir
from turbofit.core.struct import Struct
from turbofit.gateway.front import Front, NodeAddress
from turbofit.gateway.http.accesslog import access_log
from turbofit.gateway.server import GatewayThread, digest_of
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.node import NodeActor, NodeReport
from turbofit.launch.cluster.nodes import node_of
from turbofit.launch.cluster.ray_adapter import RayCallError, pin_board
from turbofit.launch.serve.detached import LEASE_SECONDS
from turbofit.planning.plan import doubled_margin, refusal
from turbofit.planning.plan_cluster import plan_cluster, plan_joining

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from turbofit.core.json_types import Document
    from turbofit.launch.cluster.ray_adapter import RayConnection
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

_TICK, _POST_SECONDS = 0.2, 1.0
#: Seconds in which other fronts hear of a changed node, before the next node changes.
_FRONTS_SECONDS: Final = 3.0
#: Seconds until an unfit node is tried again; fewer if it only has no free GPU.
_AGAIN_SECONDS: Final = 600.0
_NO_GPU_SECONDS: Final = 15.0
#: Seconds until a killed server's node is measured again: the driver may still hold its memory.
_KILLED_SECONDS: Final = 5.0
#: Seconds that the first plan waits for measurements of all nodes; late nodes join afterwards.
_MEASURE_SECONDS: Final = 180.0
_MOST_EVENTS: Final = 100
#: Seconds after the drain in which servers must end, and seconds for actors to hear of it.
_LAST_SECONDS: Final = 20.0
_HEAR_SECONDS: Final = 5.0
#: States of a node with a plan and a server for it, and states of a node without GPUs.
_WITH_PLAN: Final = ("starting", "serving")
_EMPTY: Final = ("unfit", "drained")


class _Saved(Struct, tag_field="schema", tag="turbofit.cluster-state/3"):
    """The state from which the next controller continues; ``at`` is the time of writing.

    ``request`` is the request of `serve`, in words. ``plan`` has what each node serves now,
    ``outdated`` are ids of nodes that serve an older plan.
    """

    at: float
    request: str
    changes: dict[str, Any]
    plan: ClusterPlan
    drained: tuple[str, ...]
    outdated: tuple[str, ...]


@dataclass(eq=False)
class NodeState:
    """One node and its state in this run.

     joining   its old server ends, its actor measures it, then it is planned
     starting  its server starts
     serving   the front sends requests there
     draining  the front sends nothing new, its server ends normally; then it is ``after``:
               joining for another plan, or
     unfit     it cannot serve, and joins again after the time ``until``
     drained   it serves nothing until it leaves Ray and joins again

    ``version`` is that of the cluster's plan for which the node was planned. ``killed_at`` is when
    its server was last killed. ``pending`` is the call that the actor has not answered.
    """

    ray: Node
    state: str = "joining"
    why: str = ""
    after: str = ""
    until: float = 0.0
    actor: Any = None
    pending: Any = None
    gpus: int = 0
    node: Node | None = None
    plan: NodePlan | None = None
    version: int = 0
    margin: int | None = None
    killed_at: float = -inf
    digest: str = ""
    report: NodeReport = field(default_factory=NodeReport)

    @property
    def name(self) -> str:
        return f"{self.ray.name}-{self.ray.id[:6]}"

    @property
    def open(self) -> bool:
        """Whether its server is open and serves the planned plan."""
        return self.report.state == "open" and self.report.digest == self.digest

    @property
    def failed(self) -> str:
        """The reason why its plan's server cannot serve; empty if it can, or may still."""
        report = self.report
        return report.why if report.state == "unfit" and report.digest == self.digest else ""

    @property
    def known(self) -> Node:
        """The node as it was measured, or the node with the reason why it serves nothing."""
        if self.node is not None and self.after != "drained":
            return self.node
        return replace(self.ray, why_not=self.why or "it was not measured in time")

    def be(self, state: str, why: str = "", seconds: float = 0.0) -> None:
        self.state, self.why, self.until = state, why, time.monotonic() + seconds


class Controller:
    """All nodes of a run, and the front before them.

    ``plan`` is in force, ``version`` is its number, and ``changes`` are the request's options that
    `cluster change` has replaced. During a change, ``before`` is the plan that it replaces;
    ``given_up`` is why the last change failed. ``room`` is the name in a form for folders.
    """

    plan: ClusterPlan
    front: GatewayThread[Front]

    def __init__(
        self,
        connection: RayConnection,
        config: ClusterServeConfig,
        stop: StopSignal,
        say: Callable[[str], None],
    ) -> None:
        self._connection, self.config, self._stop, self._say = connection, config, stop, say
        self.name = config.name or _model_name(config)
        self.room = "".join(c if c.isalnum() else "-" for c in self.name)
        self.state = StateFile(f"clusters/{self.room}", "cluster-state", _Saved)
        self.changes: Document = {}
        self.before: tuple[ClusterPlan, Document] | None = None
        self.version, self.given_up = 0, ""
        self.nodes: dict[str, NodeState] = {}
        self.events: deque[str] = deque(maxlen=_MOST_EVENTS)
        #: The call that posted to the board last, which returns the board's questions.
        self._posted: Any = None

    def say(self, text: str) -> None:
        self.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        with suppress(OSError, ValueError):  # the output may be closed
            self._say(text)

    def begin(self) -> None:
        """Measure all nodes, and plan for them.

        Raises:
            DoesNotFitError: no node keeps the promise.
        """
        self._look()
        end = time.monotonic() + _MEASURE_SECONDS
        while time.monotonic() < end and not all(
            node.node or node.state == "unfit" for node in self.nodes.values()
        ):
            if self._stop.signal is not None:
                return
            self._hear()
            time.sleep(_TICK)
        plan = self._plan_all(self.config.request, f"ray {self._connection.address}")
        warnings = (text for text in plan.warnings if not text.startswith(BESIDE_COMMANDS))
        for text in (plan.verdict, *(f"warning: {warning}" for warning in warnings)):
            self.say(text)
        if not plan.fits:
            raise refusal(plan)
        self.plan = plan

    def _plan_all(self, request: PlanRequest, source: str) -> ClusterPlan:
        nodes = tuple(node.known for node in self.nodes.values())
        return plan_cluster(request, Cluster(source=source, nodes=nodes))

    def resume(self) -> bool:
        """Continue with what an earlier controller of this request left; returns whether it did."""
        saved = self.state.read()
        if saved is None or saved.request != _words_of(self.config):
            return False
        if not 0 <= time.time() - saved.at < LEASE_SECONDS:
            return False
        self.say("going on with what an earlier turbofit serve has left")
        self.plan, self.changes = saved.plan, saved.changes
        for identity, ray in self._connection.watched().items():
            node, planned = NodeState(ray), saved.plan.node(identity)
            if identity in saved.drained:
                node.after = "drained"
                node.be("drained")
            elif planned is not None and planned.plan is not None and not ray.leaving:
                self._take(node, len(planned.gpus()))
                node.node = replace(ray, machine=planned.plan.machine)
                self.serve(node, planned)
                if identity in saved.outdated:
                    node.version = -1  # it changes next
            else:
                continue
            self.nodes[identity] = node
        return True

    def follow(self, board: Any, on_open: Callable[[list[str]], None]) -> signal.Signals:
        """Serve until a signal comes, or no node is left that could serve.

        Raises:
            LaunchError: no node serves any more.
        """
        opened, posted = False, 0.0
        followed: tuple[NodeAddress, ...] = ()
        self.front.start()
        while self._stop.signal is None:
            self.tick()
            if (addresses := self.addresses()) != followed:
                self.front.call(partial(Front.follow, addresses=addresses))
                followed = addresses
            if time.monotonic() - posted > _POST_SECONDS:
                posted = time.monotonic()
                self.post(board)
            if not opened and any(node.state == "serving" for node in self.nodes.values()):
                opened = True
                on_open([self.front.url])
            if why := self.hopeless:
                raise LaunchError(f"no node serves any more: {why}", hint="see the lines above")
            time.sleep(_TICK)
        return self._stop.signal

    def tick(self) -> None:
        self._look()
        self._hear()
        for node in list(self.nodes.values()):
            self._step(node)
        self._change_next()

    @property
    def hopeless(self) -> str:
        """The reason why nothing serves or will; empty if a node does or may."""
        unfit = [node.why for node in self.nodes.values() if node.state == "unfit"]
        empty = all(node.state in _EMPTY for node in self.nodes.values())
        return unfit[0] if unfit and empty else ""

    def end(self) -> None:
        """End all servers normally, and free all GPUs; a lost actor's server ends by its lease."""
        calls = [(n, n.actor.end.remote()) for n in self.nodes.values() if n.actor is not None]
        now = time.monotonic()
        heard, end = now + _HEAR_SECONDS, now + self.config.timing.drain + _LAST_SECONDS
        # Even an urgent end waits until the actors know; otherwise their servers would continue.
        left = []
        for node, call in calls:
            answer = ray_adapter.outcome(call, max(0.0, heard - time.monotonic()))
            if not isinstance(answer, RayCallError):
                left.append(node)
        while left and not self._stop.urgent and time.monotonic() < end:
            lost = self._hear()
            left = [node for node in left if node.report.state != "idle" and node not in lost]
            time.sleep(_TICK)
        for node in self.nodes.values():
            self._free(node)

    def _look(self) -> None:
        """Update the nodes: those that have come, are leaving, or have left."""
        alive = self._connection.watched()
        for identity in self.nodes.keys() - alive.keys():
            self.say(f"node {self.nodes.pop(identity).name} has left the cluster")
        for identity, ray in alive.items():
            if identity in self.nodes and ray.leaving:
                self.drain(self.nodes[identity], "Ray drains it")
            elif identity in self.nodes:
                self.nodes[identity].ray = ray
            elif not ray.leaving:
                self.nodes[identity] = NodeState(ray)
                self._join(self.nodes[identity])

    def _join(self, node: NodeState, gpus: int = 0) -> None:
        """Take ``gpus`` GPUs of a node, or with 0 all free ones, and measure it."""
        node.version = self.version
        if gpus := gpus or node.ray.free:
            self._take(node, gpus)
            node.actor.end.remote()  # a server that an earlier run has left
            node.node = None
            node.be("joining")
        else:
            why = "no GPU of it is free: jobs of Ray hold them all"
            node.be("unfit", why if node.ray.gpus else "Ray counts no GPU there", _NO_GPU_SECONDS)

    def _take(self, node: NodeState, gpus: int) -> None:
        self._free(node)
        node.gpus = gpus
        node.actor = ray_adapter.start_actor(
            NodeActor, self.room, node.ray, self.config.node_port, self.config.pretend,
            node=node.ray.id, gpus=gpus,
        )  # fmt: skip

    def _free(self, node: NodeState) -> None:
        if node.actor is not None:
            ray_adapter.kill_actor(node.actor)
        node.actor = node.pending = None
        node.gpus, node.report, node.digest = 0, NodeReport(), ""

    def _hear(self) -> list[NodeState]:
        """Read actors' answers without waiting, and ask again; returns nodes whose actor ended."""
        lost = []
        for node in self.nodes.values():
            if node.actor is None:
                continue
            node.pending = node.pending or node.actor.tell.remote()
            report = ray_adapter.outcome(node.pending, 0)
            if report is None:
                continue
            node.pending = None
            if isinstance(report, RayCallError):
                lost.append(node)
                measured = node_of(node.ray, report)
            else:
                measured = report.measured
                if report.state == "idle" and report.why:
                    measured = node_of(node.ray, RayCallError(report.why))
                if report.state:
                    node.report = report
            if node.state == "joining":
                node.node = measured
        return lost

    def _step(self, node: NodeState) -> None:
        over, another_promise = time.monotonic() >= node.until, node.version != self.version
        if node.state == "joining" and node.node is not None:
            self._settle(node, node.node)
        elif node.state in _WITH_PLAN and node.failed:
            self._failed(node)
        elif node.state == "starting" and node.open and self.has_front(node):
            self.say(f"node {node.name} serves at {node.report.url}")
            node.be("serving", seconds=_FRONTS_SECONDS)
            node.after = ""
        elif node.state == "draining" and node.report.state == "idle" and over:
            self._drained(node)
        elif node.state == "unfit" and self.before is None and (over or another_promise):
            self._join(node)

    def _drained(self, node: NodeState) -> None:
        """Let a node whose requests have ended join again, or give its GPUs back."""
        if node.after == "joining":
            node.node = None
        else:
            self._free(node)
            self.say(f"node {node.name} is {node.after}, its GPUs are given back")
        node.be(node.after, node.why, _AGAIN_SECONDS)

    def _settle(self, node: NodeState, measured: Node) -> None:
        """Have a node serve a plan that keeps the promise, or say why it cannot."""
        node.version = self.version
        request = self.config.request.changed(**self.changes)
        if node.margin is not None:
            request = request.changed(margin=node.margin)
        try:
            planned = plan_joining(request, self.plan, measured)
        except TurbofitError as exc:
            self._unfit(node, exc.message)
            return
        if planned.plan is None:
            self._unfit(node, planned.why_not)
        elif len(planned.gpus()) < node.gpus:
            # The cards that the plan does not use go back; Ray decides which of them stay.
            self._join(node, len(planned.gpus()))
        else:
            self.serve(node, planned)

    def serve(self, node: NodeState, planned: NodePlan) -> None:
        assert planned.plan is not None
        words = self.config.node_words
        digest = sha256(f"{digest_of(planned.plan)} {words}".encode()).hexdigest()[:16]
        node.plan, node.digest = planned, digest
        node.actor.serve.remote(digest, planned.plan.to_json(), words)
        node.report, node.pending = replace(node.report, state="starting", digest=digest), None
        node.be("starting")

    def _failed(self, node: NodeState) -> None:
        """React to a node's server that does not start, or has ended for good."""
        plan, code, now = node.plan and node.plan.plan, node.report.exit_code, time.monotonic()
        if not code and now - node.killed_at > _AGAIN_SECONDS:
            node.killed_at = now
            self._let_go(node, "joining", node.failed, _KILLED_SECONDS)
        elif plan and code == OutOfMemoryError.exit_code and not (node.margin or self.before):
            node.margin = doubled_margin(plan)
            self._let_go(node, "joining", "out of memory: it is planned with twice the margin")
        else:
            self._unfit(node, node.failed)

    def _unfit(self, node: NodeState, why: str) -> None:
        """Let go of a node that cannot serve; a new plan that counts on it is taken back."""
        planned = self.plan.node(node.ray.id)
        if self.before is None or planned is None or planned.plan is None:
            self._let_go(node, "unfit", why)
            return
        (self.plan, self.changes), self.before = self.before, None
        self.version -= 1
        self.given_up = f"given up: node {node.name}: {why}"
        self.say(f"the new plan does not hold, going back: node {node.name}: {why}")
        self._let_go(node, "joining", "the plan before is in force again")

    def drain(self, node: NodeState, why: str = "it is to leave") -> None:
        """Send a node no new request, and end its server normally; it serves nothing afterwards."""
        if node.after != "drained":
            self._let_go(node, "drained", why)

    def _let_go(self, node: NodeState, after: str, why: str, seconds: float = 0.0) -> None:
        node.after = after
        node.be("draining", why, seconds)
        if node.actor is not None:
            node.actor.end.remote()
        ends = "finishes what it has" if node.open else "does not serve"
        self.say(f"node {node.name} {ends}: {why}")

    # A change of plan goes node by node: the next one has a plan that is not in force.

    def _change_next(self) -> None:
        """Let the next node leave the front, once all fronts know the last changed one again."""
        serving = [node for node in self.nodes.values() if node.state == "serving"]
        if self._returning() or any(node.until > time.monotonic() for node in serving):
            return
        if old := self._outdated():
            self._let_go(old[0], "joining", "another plan is in force")
        elif self.before is not None:
            self.before = None
            self.say(f"the plan has changed: {self.plan.promise}")

    def _returning(self) -> list[NodeState]:
        """Nodes whose server ended, or was killed, and does not serve again yet."""
        return [node for node in self.nodes.values() if node.after == "joining"]

    def _outdated(self) -> list[NodeState]:
        nodes = self.nodes.values()
        return [n for n in nodes if n.state in _WITH_PLAN and n.version != self.version]

    @property
    def change(self) -> str:
        """The progress of a change, or why the last one failed."""
        if self.before is None:
            return self.given_up
        nodes = [node for node in self.nodes.values() if node.state not in _EMPTY]
        done = sum(node.state == "serving" and node.version == self.version for node in nodes)
        return f"{done} of {len(nodes)} nodes have the new plan"

    def has_front(self, node: NodeState) -> bool:
        """Whether the front sends requests to a node's current server."""
        front_node = self.front.call(lambda front: front.nodes.get(node.name))
        return front_node is not None and front_node.up and front_node.url == node.report.url

    def answer(self, question: Document) -> Document:
        """The answer to another command; an error if it is refused, and then nothing changes."""
        try:
            if question.get("kind") == "drain":
                node = self._named(str(question.get("node", "")))
                self.drain(node)
                return {"said": f"node {node.name} finishes what it has"}
            if question.get("kind") == "change":
                return {"said": self._change({**self.changes, **question.get("keywords", {})})}
            raise UsageError("nobody knows this question", hint="use one turbofit on all nodes")
        except TurbofitError as exc:
            return exc.to_dict()

    def _change(self, changes: Document) -> str:
        if self.before or self._outdated() or self._returning():
            # A node that is being measured would count as absent.
            hint = "see turbofit cluster status, and wait"
            raise LaunchError("a change is under way already, or a node comes back", hint=hint)
        target = self._plan_all(self.config.request.changed(**changes), self.plan.source)
        if not target.fits:
            hint = "nothing has changed; see turbofit plan --cluster for what would fit"
            raise DoesNotFitError(target.verdict, hint=hint)
        self.say(f"a change of plan begins: {self.plan.promise} -> {target.promise}")
        self.before, self.given_up = (self._served(), self.changes), ""
        self.plan, self.changes, self.version = target, changes, self.version + 1
        note = "node by node from here on; until the last one has changed, a request may meet"
        return f"{target.verdict}; {note} either plan's limits"

    def _named(self, name: str) -> NodeState:
        """The node with this name or address, or whose id begins so; a `UsageError` otherwise."""
        nodes = [
            node for node in self.nodes.values() if name
            and name in (node.name, node.ray.name, node.ray.address, node.ray.id[: len(name)])
        ]  # fmt: skip
        if len(nodes) != 1:
            hint = "turbofit cluster status shows names and ids"
            raise UsageError(f"{len(nodes) or 'no'} nodes are {name!r}", hint=hint)
        return nodes[0]

    def addresses(self) -> tuple[NodeAddress, ...]:
        return tuple(
            NodeAddress(
                name=node.name, url=node.report.url, key=node.report.key,
                draining=node.state not in _WITH_PLAN,
            )
            for node in self.nodes.values()
            if node.open
        )  # fmt: skip

    def post(self, board: Any) -> None:
        nodes = self.nodes.items()
        self.state.write(
            _Saved(
                at=time.time(), request=_words_of(self.config), changes=self.changes,
                plan=self._served(),
                drained=tuple(key for key, node in nodes if node.after == "drained"),
                outdated=tuple(key for key, node in nodes if node.version != self.version),
            )
        )  # fmt: skip
        questions = ray_adapter.outcome(self._posted, 0) if self._posted else {}
        if questions is None:
            return
        if isinstance(questions, RayCallError):
            questions = {}  # the board starts again
        answers = {number: self.answer(question) for number, question in questions.items()}
        page = self.front.call(self.status), self.addresses()
        self._posted = board.post.remote(page, answers)

    def status(self, front: Front) -> ClusterStatus:
        """The whole state, for people; call it in the front's loop."""
        nodes = []
        for node in self.nodes.values():
            front_node, plan = front.nodes.get(node.name), node.plan and node.plan.plan
            nodes.append(
                NodeStatus(
                    id=node.ray.id, name=node.name, address=node.ray.address,
                    state=node.state,  # type: ignore[arg-type]
                    cards=node.plan.cards if node.plan is not None else "",
                    why_not=node.why or node.failed, said=node.report.last_line,
                    url=node.report.url, folder=node.report.folder,
                    up=front_node is not None and front_node.up,
                    outstanding=0 if front_node is None else front_node.outstanding,
                    at_once=0.0 if front_node is None or not front_node.up else front_node.capacity,
                    tokens=plan.kv.total_tokens if plan else 0,
                )
            )  # fmt: skip
        return ClusterStatus(
            name=self.name, model=self.plan.model.name, source=self.plan.source,
            pretend=self.config.pretend,
            at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), urls=(self.front.url,),
            promise=self.plan.promise, nodes=tuple(nodes), change=self.change,
            events=tuple(self.events),
        )  # fmt: skip

    def _served(self) -> ClusterPlan:
        """The plan in force, with the plan that each node serves now."""
        nodes = tuple(node.plan for node in self.nodes.values() if node.plan is not None)
        return replace(self.plan, nodes=nodes)


def serve_cluster(
    config: ClusterServeConfig,
    stop: StopSignal,
    *,
    say: Callable[[str], None],
    on_open: Callable[[list[str]], None],
) -> signal.Signals:
    """Measure, plan, launch, and serve until a signal. Call it in the main thread."""
    with ray_adapter.connected(config.address) as connection:
        stop.rearm()  # Ray takes SIGTERM
        controller = Controller(connection, config, stop, say)
        board = pin_board(controller.name, connection.here)
        folder = state_dir(controller.state.room)
        assert config.gateway is not None
        public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
        log = access_log(config.access_log or str(folder / "access.log"))
        tls = ray_adapter.client_context(os.environ)
        front = controller.front = GatewayThread(Front((), public, log, tls=tls))
        stop.abrupt = False
        try:
            if not controller.resume():
                controller.begin()
            return controller.follow(board, on_open)
        finally:
            stop.on_second(front.cut_off)
            if front.alive and not stop.urgent:
                controller.say("draining: what is under way may end")
            front.stop(drain=not stop.urgent)
            if stop.signal is not None:
                controller.say(f"stopping: {stop.signal.name}")
            with suppress(Exception):  # Ray may be gone: then nodes end by their lease
                controller.end()
            controller.state.forget()
            stop.abrupt = stop.signal is None


def _words_of(config: ClusterServeConfig) -> str:
    """A text of a request: a controller continues only what one with an equal text has left."""
    given = {name: value for name, value in config.request.given().items() if name != "model"}
    return repr((_model_name(config), sorted(given.items()), config.node_words))


def _model_name(config: ClusterServeConfig) -> str:
    model = config.request.model
    return model if isinstance(model, str) else model.name
