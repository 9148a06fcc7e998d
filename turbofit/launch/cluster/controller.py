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
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

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
from turbofit.core.process.state import state_dir
from turbofit.core.struct import Struct
from turbofit.gateway.front import Front, NodeAddress
from turbofit.gateway.http.accesslog import access_log
from turbofit.gateway.server import GatewayThread, digest_of
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.node import NodeActor, NodeReport
from turbofit.launch.cluster.nodes import held_only, node_of
from turbofit.launch.cluster.ray_adapter import RayCallError, ResultTimeoutError, pin_board
from turbofit.launch.serve.runs import LEASE_SECONDS, StateFile
from turbofit.planning.plan import doubled_margin, plan_cluster, plan_joining, refusal

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Generator

    from turbofit.core.json_types import Document
    from turbofit.launch.cluster.ray_adapter import RayConnection, RayNode
    from turbofit.launch.serve.config import ClusterServeConfig
    from turbofit.launch.serve.supervisor import StopSignal
    from turbofit.planning.request import PlanRequest

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
#: States of a node that serves nothing until it leaves and joins again.
_EMPTY: Final = ("draining", "drained")
_DONE: Final = object()


class _Saved(Struct, tag_field="schema", tag="turbofit.cluster-state/1"):
    """What the next controller needs to go on.

    The run's name, a digest of its request, what was changed since, what each node serves, and the
    ids of nodes that are to serve nothing. ``at`` is when, in seconds since the machine's boot.
    """

    run: str
    at: float
    request: str
    changes: dict[str, Any]
    plan: ClusterPlan
    drained: tuple[str, ...] = ()


@dataclass(eq=False)
class NodeState:
    """One node and its state in this run.

    ``pending`` is what the actor has not answered yet: while the node is joining, how it was
    measured, else how its server is. ``silent`` says why the actor does not answer: it starts
    again, or its node is gone.
    """

    ray: RayNode
    state: str = "joining"
    why: str = ""
    again: float = 0.0
    actor: Any = None
    gpus: int = 0
    pending: Any = None
    node: Node | None = None
    plan: NodePlan | None = None
    margin: int | None = None
    digest: str = ""
    report: NodeReport = field(default_factory=NodeReport)
    silent: str = ""

    @property
    def name(self) -> str:
        """What fronts and people call it."""
        return f"{self.ray.name}-{self.ray.id[:6]}"

    @property
    def open(self) -> bool:
        """Whether its planned server answers."""
        return self.report.state == "open" and self.report.digest == self.digest

    @property
    def failed(self) -> str:
        """Why the server of its plan cannot serve; empty where it can, or may."""
        report = self.report
        return report.why if report.state == "unfit" and report.digest == self.digest else ""

    @property
    def known(self) -> Node:
        """The node as it was measured, or why it was not."""
        ray, why = self.ray, self.why or "it was not measured in time"
        return self.node or Node(id=ray.id, name=ray.name, address=ray.address, why_not=why)

    def be(self, state: str, why: str = "", again: float = _AGAIN_SECONDS) -> None:
        """Change the state, with the reason, and try again after so many seconds."""
        if self.state == "joining":
            self.pending = None  # a measurement, which no other state waits for
        self.state, self.why, self.again = state, why, time.monotonic() + again


class Controller:
    """All nodes of a run, and the front before them.

    ``plan`` is what is served, ``changes`` what `cluster change` has made another of the request,
    ``change`` how far a change has come, whose steps ``changing`` takes while it is under way.
    """

    plan: ClusterPlan
    front: GatewayThread[Front]

    def __init__(
        self, connection: RayConnection, config: ClusterServeConfig, say: Callable[[str], None]
    ) -> None:
        self._connection, self._say, self.config = connection, say, config
        self.changes: Document = {}
        self.nodes: dict[str, NodeState] = {}
        self.run, self.change = secrets.token_hex(4), ""
        self.events: deque[str] = deque(maxlen=_MOST_EVENTS)
        self.changing: Generator[None, None, None] | None = None
        #: What the board was told last, and gives questions for.
        self._posted: Any = None

    @property
    def request(self) -> PlanRequest:
        """What is planned for now."""
        return self.config.request.changed(**self.changes)

    def say(self, text: str) -> None:
        """Tell people, and remember it."""
        self.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._say(text)

    # From the first look to the last.

    def begin(self, stopped: Callable[[], bool]) -> None:
        """Measure all nodes, and plan for them."""
        self._look()
        end = time.monotonic() + _MEASURE_SECONDS
        while any(node.pending is not None for node in self.nodes.values()) and not stopped():
            if time.monotonic() > end:
                break
            self._hear()
            time.sleep(_TICK)
        known = tuple(node.known for node in self.nodes.values())
        cluster = Cluster(source=f"ray {self._connection.address}", nodes=known)
        plan = plan_cluster(self.request, cluster)
        self.say(plan.verdict)
        for warning in plan.warnings:
            self._say(f"warning: {warning}")
        if not plan.fits:
            raise refusal(plan)
        self.plan = plan
        for node in self.nodes.values():
            if node.node is not None:
                self._settle(node, plan.node(node.ray.id))

    def resume(self, saved: _Saved) -> None:
        """Go on with what an earlier controller has left."""
        self.run, self.plan, self.changes = saved.run, saved.plan, saved.changes
        for ray_node in self._connection.watched().values():
            node, planned = NodeState(ray_node), saved.plan.node(ray_node.id)
            if ray_node.id in saved.drained:
                node.be("drained")
            elif planned is not None and planned.plan is not None and not ray_node.leaving:
                self._take(node, len(planned.gpus()))
                machine, pretend = planned.plan.machine, self.config.pretend
                node.node = replace(node.known, machine=machine, pretend=pretend, why_not="")
                self.serve(node, planned)
            else:
                continue
            self.nodes[ray_node.id] = node

    def follow(
        self,
        stop: StopSignal,
        front: GatewayThread[Front],
        post: Callable[[], None],
        on_open: Callable[[list[str]], None],
    ) -> signal.Signals:
        """Serve until a signal comes, or nothing is left to serve with."""
        self.front, opened, posted = front, False, 0.0
        followed: tuple[NodeAddress, ...] = ()
        front.start()
        while stop.signal is None:
            try:
                self.tick()
            except MachineError as exc:
                self._outlive(exc, stop)
            if (addresses := self.addresses()) != followed:
                front.call(partial(Front.follow, addresses=addresses))
                followed = addresses
            if time.monotonic() - posted > _POST_SECONDS:
                posted = time.monotonic()
                post()
            if not opened and self._up():
                opened = True
                on_open([front.url])
            if why := self.hopeless:
                raise LaunchError(f"no node serves any more: {why}", hint="see the lines above")
            time.sleep(_TICK)
        return stop.signal

    def tick(self) -> None:
        """One look at everything."""
        self._look()
        self._hear()
        for node in list(self.nodes.values()):
            self._step(node)
        if self.changing and next(self.changing, _DONE) is _DONE:
            self.changing = None

    def _outlive(self, exc: MachineError, stop: StopSignal) -> None:
        """Ray's head is gone: nodes serve until their lease ends."""
        self.say(f"warning: {exc.message}: nodes end in order within {LEASE_SECONDS:.0f} s")
        while stop.signal is None and self._up():
            time.sleep(_TICK)
        if stop.signal is None:
            raise exc

    def _up(self) -> bool:
        """Whether the front has a node to send requests to."""
        return bool(self.front.call(lambda front: front.health()["up"]))

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
            left = [
                node for node in self.nodes.values() if node.actor and node.report.state != "idle"
            ]
            if all(node.silent and late for node in left):
                break
            time.sleep(_TICK)
        for node in self.nodes.values():
            self._free(node)

    # One node, from its coming to its going.

    def _look(self) -> None:
        """Who has come, who is leaving, who has gone."""
        alive = self._connection.watched()
        for identity in self.nodes.keys() - alive.keys():
            self.say(f"node {self.nodes.pop(identity).name} has left the cluster")
        for identity, ray_node in alive.items():
            if identity in self.nodes and ray_node.leaving:
                self.drain(self.nodes[identity], "Ray drains it")
            elif identity not in self.nodes and not ray_node.leaving:
                self.nodes[identity] = NodeState(ray_node)
                self._join(self.nodes[identity])

    def _join(self, node: NodeState) -> None:
        """Take a node's free GPUs, and measure it."""
        if free := ray_adapter.free_gpus().get(node.ray.id, 0) if node.ray.gpus else 0:
            self._measure(node, free)
        else:
            why = "no GPU of it is free: jobs of Ray hold them all"
            node.be("unfit", why if node.ray.gpus else "Ray counts no GPU there", _NO_GPU_SECONDS)

    def _measure(self, node: NodeState, gpus: int) -> None:
        node.be("joining")
        self._take(node, gpus)
        node.node, node.pending = None, node.actor.measure.remote(self.config.pretend)

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
        node.actor = node.pending = None
        node.gpus, node.report, node.digest = 0, NodeReport(), ""

    def _hear(self) -> None:
        """Take what actors have answered, and ask them again."""
        for node in self.nodes.values():
            joins = node.state == "joining"
            if node.actor is not None and node.pending is None and not joins:
                node.pending = node.actor.tell.remote()
            if node.pending is None:
                continue
            answer = ray_adapter.outcome(node.pending, 0)
            if isinstance(answer, ResultTimeoutError):
                continue
            node.pending = None
            fails = isinstance(answer, RayCallError)
            if joins:
                measured, gpus = (answer, ()) if fails else answer
                node.node = held_only(node_of(node.ray, measured), gpus)
            else:
                node.report, node.silent = node.report if fails else answer, str(answer) * fails

    def _planned(self, node: NodeState) -> NodePlan:
        """A node's plan under the promise."""
        assert node.node is not None
        request, ray = self.request, node.ray
        if node.margin is not None:
            request = request.changed(margin=node.margin)
        try:
            return plan_joining(request, self.plan, node.node)
        except TurbofitError as exc:
            return NodePlan(node=ray.id, name=ray.name, address=ray.address, why_not=exc.message)

    def _settle(self, node: NodeState, planned: NodePlan | None) -> None:
        """Have a measured node serve its plan, or say why it cannot."""
        if planned is None or planned.plan is None:
            self._unfit(node, planned.why_not if planned else "it was not planned for")
        elif len(planned.gpus()) < node.gpus:
            # The cards that the plan leaves go back; which of them stay is Ray's to say.
            self._measure(node, len(planned.gpus()))
        else:
            self.serve(node, planned)

    def serve(self, node: NodeState, planned: NodePlan) -> None:
        """Have a node's actor serve a plan."""
        assert planned.plan is not None
        words = self.config.node_words
        digest = sha256(f"{digest_of(planned.plan)} {words}".encode()).hexdigest()[:16]
        node.plan, node.digest = planned, digest
        node.actor.serve.remote(digest, planned.plan.to_json(), words)
        node.report, node.pending = replace(node.report, state="starting", digest=digest), None
        if node.state != "changing":
            node.be("starting")

    def _step(self, node: NodeState) -> None:
        """What follows from where a node stands."""
        if node.state == "joining" and node.node is not None:
            self._settle(node, self._planned(node))
        elif node.state == "starting" and node.open:
            node.be("serving")
            self.say(f"node {node.name} serves at {node.report.url}")
        elif node.state in ("starting", "serving") and node.failed:
            self._failed(node)
        elif node.state == "draining" and node.report.state == "idle":
            self._free(node)
            node.be("drained", node.why)
            self.say(f"node {node.name} is drained, its GPUs are given back")
        elif node.state == "unfit" and time.monotonic() >= node.again:
            self._join(node)

    def _failed(self, node: NodeState) -> None:
        """A node's server does not start, or has ended for good."""
        plan = node.plan and node.plan.plan
        if node.report.exit_code == OutOfMemoryError.exit_code and not node.margin and plan:
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
        if node.actor is None and node.state not in _EMPTY:
            node.be("drained", why)
        elif node.state not in _EMPTY:
            node.be("draining", why)
            node.actor.end.remote()
            self.say(f"node {node.name} finishes what it has")

    @property
    def hopeless(self) -> str:
        """Why nothing serves or will; empty where something does."""
        nodes = self.nodes.values()
        if any(node.state not in ("unfit", "drained") for node in nodes):
            return ""
        return next((node.why for node in nodes if node.state == "unfit"), "")

    # From one plan to another.

    def _changed(self, target: ClusterPlan, changes: Document) -> Generator[None, None, None]:
        """The steps from what is served to another plan of the same model.

        A node that the new plan leaves out is no failure; the first one that fails with the new
        plan brings the old one back on all that have changed, the last one first.
        """
        before, changes_before = self.plan, self.changes
        self.plan, self.changes = target, changes
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
            self.plan, self.changes = before, changes_before
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
        if node.state == "unfit":
            node.again = 0.0  # it has given its GPUs back, and joins under this plan
        if node.ray.id not in self.nodes or node.actor is None or node.state in _EMPTY:
            return
        if planned is None or planned.plan is None:
            planned = self._planned(node)
        if planned.plan is None:
            self.drain(node)
            while node.ray.id in self.nodes and node.state == "draining":
                yield
            node.be("unfit", planned.why_not)
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

    def has_front(self, node: NodeState) -> bool:
        """Whether the front sends requests to a node's present server."""

        def up(front: Front) -> bool:
            front_node = front.nodes.get(node.name)
            return front_node is not None and front_node.up and front_node.url == node.report.url

        return self.front.call(up)

    # What others are told, and ask.

    def answer(self, question: Document) -> Document:
        """What another command is told; an error where it is refused, and nothing has changed."""
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
        if self.changing:
            hint = "see turbofit cluster status, and wait"
            raise LaunchError("a change is under way already", hint=hint)
        nodes = tuple(node.known for node in self.nodes.values())
        cluster = Cluster(source=self.plan.source, nodes=nodes)
        target = plan_cluster(self.config.request.changed(**changes), cluster)
        if not target.fits:
            hint = "nothing has changed; see turbofit plan --cluster for what would fit"
            raise DoesNotFitError(target.verdict, hint=hint)
        self.changing = self._changed(target, changes)
        note = "node by node from here on; until the last one has changed, a request may meet"
        return f"{target.verdict}; {note} either plan's limits"

    def _named(self, name: str) -> NodeState:
        """The node with this name, address or beginning of an id."""
        nodes = [
            node for node in self.nodes.values()
            if name in (node.name, node.ray.name, node.ray.address)
            or (name and node.ray.id.startswith(name))
        ]  # fmt: skip
        if len(nodes) != 1:
            many = f"{len(nodes)} nodes are" if nodes else "no node is"
            hint = "turbofit cluster status shows names and ids"
            raise UsageError(f"{many} {name!r}", hint=hint)
        return nodes[0]

    def addresses(self) -> tuple[NodeAddress, ...]:
        """Where fronts find nodes, with their keys."""
        return tuple(
            NodeAddress(
                name=node.name, url=node.report.url, key=node.report.key,
                draining=node.state not in ("serving", "starting"),
            )
            for node in self.nodes.values()
            if node.report.url
        )  # fmt: skip

    def post(self, board: Any, state: StateFile[_Saved]) -> None:
        """Write the state down, tell the board, and answer what was asked there."""
        status = self.front.call(self.status)
        state.write(self.saved())
        questions = ray_adapter.outcome(self._posted, 0) if self._posted else {}
        if isinstance(questions, ResultTimeoutError):
            return
        if isinstance(questions, RayCallError):
            questions = {}  # the board starts again
        answers = {number: self.answer(question) for number, question in questions.items()}
        self._posted = board.post.remote(status, self.addresses(), answers)

    def status(self, front: Front) -> ClusterStatus:
        """All of it, for people; runs in the front's loop."""
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
            name=self.config.name or self.plan.model.name, model=self.plan.model.name,
            source=self.plan.source, pretend=self.config.pretend,
            at=time.strftime("%Y-%m-%dT%H:%M:%S%z"), urls=(self.front.url,),
            promise=promise_of(self.plan), nodes=tuple(nodes), change=self.change,
            events=tuple(self.events),
        )  # fmt: skip

    def saved(self) -> _Saved:
        """What each node serves now, for the next controller."""
        nodes = tuple(node.plan for node in self.nodes.values() if node.plan is not None)
        return _Saved(
            run=self.run, at=_since_boot(), request=_request_digest(self.config),
            changes=self.changes, plan=replace(self.plan, nodes=nodes),
            drained=tuple(key for key, node in self.nodes.items() if node.state in _EMPTY),
        )  # fmt: skip


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
        room = f"clusters/{''.join(c if c.isalnum() else '-' for c in name)}"
        folder, state = state_dir(room), StateFile(room, "cluster-state", _Saved)
        assert config.gateway is not None
        public = replace(config.gateway, drain_seconds=config.timing.drain, pretend=config.pretend)
        log = access_log(config.access_log or str(folder / "access.log"))
        tls = ray_adapter.client_context(os.environ)
        front = GatewayThread(Front((), public, log, tls=tls))
        failed, stop.abrupt = True, False
        try:
            if (saved := _saved(state, _request_digest(config))) is not None:
                controller.say("going on with what an earlier turbofit serve has left")
                controller.resume(saved)
            else:
                controller.begin(lambda: stop.signal is not None)
            ended = controller.follow(stop, front, partial(controller.post, board, state), on_open)
            failed = False
            return ended
        finally:
            urgent = failed or stop.urgent
            stop.on_second(front.cut_off)
            if not urgent:
                controller.say("draining: what is under way may end")
            front.stop(drain=not urgent)
            if stop.signal is not None:
                controller.say(f"stopping: {stop.signal.name}")
            with suppress(Exception):  # Ray may be gone: nodes end by their lease
                controller.end(config.timing.drain + _LAST_SECONDS, lambda: stop.urgent)
            state.forget()
            stop.abrupt = stop.signal is None


def _saved(state: StateFile[_Saved], request: str) -> _Saved | None:
    """What an earlier controller of the same request has left while its servers' lease lasts."""
    saved = state.read()
    if saved is None or saved.request != request or not saved.plan.fits:
        return None
    return saved if 0 <= _since_boot() - saved.at < LEASE_SECONDS else None


def _since_boot() -> float:
    """Seconds that this machine has been up, asleep too: a clock that nobody sets."""
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
