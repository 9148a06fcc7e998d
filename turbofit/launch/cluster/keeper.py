"""Keeps a cluster serving: nodes that join, leave or die, engines that fail, the gateways' roll.

Everything happens in `Keeper.tick`, which never waits: what takes time (measuring a node, planning
for it) is done by a worker, what engines do comes as news of their actors, and a change of plan is
a generator that goes one step a tick.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.cluster import ClusterStatus, Node, NodePlan
from turbofit.core.errors import LaunchError, UsageError, error_from
from turbofit.gateway.meet import meet
from turbofit.gateway.roll import Roll
from turbofit.gateway.roster import check_gateways
from turbofit.launch.cluster import ray_adapter
from turbofit.launch.cluster.agent import start_agent
from turbofit.launch.cluster.nodes import held_only, index_of, tell_nodes
from turbofit.launch.cluster.post import Post
from turbofit.launch.cluster.promise import (
    bounds_of_cluster,
    expected_members,
    in_words,
    orders_of,
)
from turbofit.launch.cluster.site import Site, outcome
from turbofit.planning.cluster import plan_joining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from turbofit.core.cluster import ClusterPlan
    from turbofit.launch.cluster.connect import Alive, Connection
    from turbofit.launch.cluster.places import Places
    from turbofit.launch.config import ClusterServeConfig

__all__ = ["Keeper"]

_LOOK_SECONDS: Final = 1.0
#: A node that cannot serve, or whose engine failed for good, is tried again after so long.
_AGAIN_SECONDS: Final = 600.0
_EVENTS: Final = 50
_GIVE_SECONDS: Final = 10.0
#: Where a node's death ended its engines, Ray tells of the node a moment later.
_SURE_SECONDS: Final = 3.0


class Keeper:
    """A model on a cluster.

    Args:
        connection: to Ray.
        places: the GPUs that are held.
        plan: what is served.
        sites: the nodes that were measured for it.
        config: what every engine is started with.
        say: takes lines of progress.
        name: what people call it.
    """

    def __init__(
        self,
        connection: Connection,
        places: Places,
        plan: ClusterPlan,
        sites: list[Site],
        config: ClusterServeConfig,
        say: Callable[[str], None],
        *,
        name: str,
    ) -> None:
        self.connection, self.places, self.plan, self.config = connection, places, plan, config
        self.name = name
        self._say = say
        self.sites = {site.node.id: site for site in sites}
        self.bounds = bounds_of_cluster(plan)
        self.gateways = 1
        self.peers: tuple[str, ...] = (connection.here_address,)
        #: Requests at each engine, and whether it is up, as the gateways told last.
        self.outstanding: Mapping[str, int] = {}
        #: The roll that all gateways followed when they told it.
        self.followed = -1
        self.up: Mapping[str, bool] = {}
        self.change = ""
        self.events: deque[str] = deque(maxlen=_EVENTS)
        self._steps: Iterator[None] | None = None
        self._number, self._told = 0, Roll(number=0, bounds=self.bounds, members=())
        self._looked = float("-inf")
        self._hopeless: float | None = None
        self._worker = ThreadPoolExecutor(1, "nodes")

    def say(self, text: str) -> None:
        """Progress, which `status` shows too."""
        self.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._say(text)

    def begin(self) -> None:
        """Start what is planned."""
        for node in self.plan.nodes:
            site = self.sites.get(node.node)
            if site is not None:
                site.promised = self.plan
                self.settle(site, node)

    def tick(self, seconds: float) -> None:
        """One look at everything, after news or so many seconds.

        Raises:
            TurbofitError: nothing serves any more, and nothing will; or Ray is gone.
        """
        self._hear(seconds)
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._look(self.connection.watched())
        for site in tuple(self.sites.values()):
            self._mind(site, now)
        if self._steps is not None and next(self._steps, self) is self:
            self._steps = None
        self._raise_if_nothing_serves()

    def roll(self) -> Roll:
        """What gateways are to be told now."""
        members = tuple(member for site in self.sites.values() for member in site.members())
        told = self._told
        if (members, self.bounds, self.gateways) != (told.members, told.bounds, told.gateways):
            self._number += 1
            self._told = Roll(
                number=self._number, bounds=self.bounds, members=members, gateways=self.gateways
            )
        return self._told

    def status(self, urls: tuple[str, ...]) -> ClusterStatus:
        """For people and scripts."""
        return ClusterStatus(
            name=self.name,
            model=self.plan.model.name,
            source=f"ray {self.connection.address}",
            pretend=self.config.pretend,
            at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            urls=urls,
            promise=in_words(self.plan),
            nodes=tuple(site.status(self.up, self.outstanding) for site in self.sites.values()),
            change=self.change,
            events=tuple(self.events),
        )

    def let(self, peers: tuple[str, ...]) -> None:
        """Gateways at these addresses may reach the engines from now on, and no others."""
        self.peers = peers
        for site in self.sites.values():
            for post in site.posts:
                post.allow(peers)

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that stay, as they were measured before anything was started there."""
        return tuple(site.node for site in self.sites.values() if site.state != "drained")

    def later(self, work: Callable[[], Any]) -> Any:
        """Have something done by the worker; a future."""
        return self._worker.submit(work)

    @property
    def changing(self) -> bool:
        """Whether a change of plan is under way."""
        return self._steps is not None

    def follow(self, steps: Iterator[None]) -> None:
        """Go through these steps, one a tick.

        Raises:
            LaunchError: others are under way.
        """
        if self._steps is not None:
            raise LaunchError(
                "a change is under way already", hint="see turbofit cluster status, and wait"
            )
        self._steps = steps

    def widen(self) -> None:
        """Hold requests to no more than the plan and what serves under it ask for."""
        own = [s.plan for s in self.sites.values() if s.plan.plan and s.promised is self.plan]
        self.bounds = bounds_of_cluster(replace(self.plan, nodes=(*self.plan.nodes, *own)))

    def settle(self, site: Site, plan: NodePlan) -> None:
        """Start on a node what is planned for it, and give back the GPUs that it does not use."""
        held: dict[int, str] = {}
        if plan.plan is not None:
            found = index_of(plan.plan.machine, self.places.on(site.node.id))
            held = {index: one for one, index in found.items()}
            why = self._in_the_way(plan, held)
            plan = replace(plan, plan=None, why_not=why) if why else plan
        site.plan, site.posts = plan, []
        if plan.plan is None:
            self.places.drop(site.node.id)
            site.state, site.again_at = "unfit", time.monotonic() + _AGAIN_SECONDS
            self.say(f"node {site.node.name} does not serve: {site.why_not}")
            return
        site.state, site.again_at = "serving", float("inf")
        self.bounds = meet(self.bounds, bounds_of_cluster(replace(self.plan, nodes=(plan,))))
        here = site.node.id == self.connection.here
        orders = orders_of(plan, self.plan, self.config, here=here, peers=self.peers)
        self.places.keep(site.node.id, [held[index] for index in plan.gpus()])
        for order, member in zip(orders, expected_members(plan), strict=True):
            place = self.places.place(site.node.id, held[order.plan.parallel.groups[0][0]])
            post = Post(
                order, place, share=member.share, host_bytes=member.host_bytes, start=start_agent
            )
            site.posts.append(post)
            post.begin()

    def _in_the_way(self, plan: NodePlan, held: Mapping[int, str]) -> str:
        """Why a plan cannot be started on its node, or nothing."""
        if not plan.gpus() <= held.keys():
            return "other jobs of Ray have taken its GPUs"
        roll = self.roll()
        try:
            check_gateways(replace(roll, members=tuple(expected_members(plan))))
        except UsageError as exc:
            return exc.message
        return ""

    def measure(self, site: Site, known: NodePlan | None = None) -> Any:
        """Begin to measure a node and to plan for it; a future of its `NodePlan`.

        With a plan that is known, only to take its GPUs again.
        """
        plan, config = self.plan, self.config
        site.promised = plan
        alive = self.connection.watched().get(site.node.id)

        def work() -> NodePlan:
            if alive is None:
                return NodePlan(
                    node=site.node.id, name=site.node.name, address=site.node.address,
                    why_not="it left the cluster",
                )  # fmt: skip
            self.places.take([alive.id])
            if known is not None:
                return known
            (site.node,) = tell_nodes([alive], pretend=config.pretend)
            site.node = held_only(site.node, self.places.on(alive.id))
            return plan_joining(config.request, plan, site.node)

        return self.later(work)

    def stop(self, seconds: float, urgent: Callable[[], bool]) -> None:
        """End everything; nothing is left when it returns.

        Args:
            seconds: how long engines may take to end in order.
            urgent: whether there is no time, looked at again and again.
        """
        # What the worker waits for may take minutes, and ends with the connection.
        self._worker.shutdown(wait=False, cancel_futures=True)
        posts = [post for site in self.sites.values() for post in site.posts]
        deadline = time.monotonic() + seconds
        # Asked always: where Ray's head is gone, nothing else ends them.
        for post in posts:
            post.stop(seconds)
        while not urgent() and time.monotonic() < deadline:
            if all(post.ended() for post in posts):
                break
            time.sleep(0.05)
        for post in posts:
            post.end()

        def give_back() -> None:
            for node in tuple(self.sites):
                self.places.leave(node)

        # Without a head Ray does not return. What is not given back here ends with the connection.
        giving = threading.Thread(target=give_back, name="places", daemon=True)
        giving.start()
        giving.join(_GIVE_SECONDS)

    def _hear(self, seconds: float) -> None:
        """Wait for news of any engine, and take all that there is."""
        posts = [post for site in self.sites.values() for post in site.posts]
        asked = [post.news for post in posts if post.news is not None]
        told: set[Any] = set()
        if asked:
            told = ray_adapter.wait_any(asked, seconds)
        else:
            time.sleep(seconds)
        for post in posts:
            before = post.standing
            if (post.news is None or post.news in told) and post.hear():
                self._tell(post, before.state, before.said)

    def _tell(self, post: Post, state: str, said: str) -> None:
        """Say what is new of an engine."""
        now = post.standing
        if now.said != said and now.said:
            self._say(f"{post.order.name}: {now.said}")
        if now.state == state:
            return
        if now.state == "ready":
            self.say(f"{post.order.name}: ready")
        elif now.state == "failed":
            self.say(f"{post.order.name}: failed: {now.error.get('message', '')}")

    def _look(self, alive: Mapping[str, Alive]) -> None:
        """Nodes that came, went, or are going."""
        for identity in [one for one in self.sites if one not in alive]:
            site = self.sites.pop(identity)
            self.say(f"node {site.node.name} is gone")
            for post in site.posts:
                post.end()
            self.places.leave(identity)
        for node in alive.values():
            known = self.sites.get(node.id)
            if known is None and node.gpus and not node.leaving:
                self.say(f"node {node.name} joined")
                site = Site(Node(id=node.id, name=node.name, address=node.address))
                self.sites[node.id] = site
                site.work = self.measure(site)
            elif known is not None and node.leaving and known.state not in ("drained", "unfit"):
                self.drain(known)

    def drain(self, site: Site) -> None:
        """Let what a node has under way end, then stop its engines and give back its GPUs."""
        site.state, site.again_at = "drained", float("inf")
        self.say(f"node {site.node.name} is drained")
        self.empty(site)
        if not site.posts:
            self.places.leave(site.node.id)

    def empty(self, site: Site) -> None:
        """Send nothing more to a node's engines."""
        for post in site.posts:
            post.draining = True
            post.drained_by = time.monotonic() + self.config.timing.drain
        number = self.roll().number
        for post in site.posts:
            post.drained_in = number

    def idle(self, site: Site) -> bool:
        """Whether a draining node has nothing under way any more, or no more time.

        What a gateway told before it knew of the draining does not count.
        """
        now = time.monotonic()
        return all(
            now >= post.drained_by
            or (self.followed >= post.drained_in and not self.outstanding.get(post.order.name, 0))
            for post in site.posts
        )

    def _mind(self, site: Site, now: float) -> None:
        """What one node needs."""
        if site.work is not None and site.work.done():
            work, site.work = site.work, None
            if site.state != "joining":
                return
            if site.promised is not self.plan:  # the plan has changed meanwhile
                site.work = self.measure(site)
                return
            self.settle(site, outcome(work, site))
        elif site.state == "drained" and site.posts and self.idle(site):
            if self.closed(site):
                self.places.leave(site.node.id)
                self.say(f"node {site.node.name}: its engines have ended, its GPUs are given back")
        elif site.state == "unfit" and now >= site.again_at:
            site.state, site.again_at = "joining", float("inf")
            site.work = self.measure(site)
        elif site.state == "serving" and site.failed and site.again_at > now + _AGAIN_SECONDS:
            site.again_at = now + _AGAIN_SECONDS
        elif site.state == "serving" and site.failed and now >= site.again_at:
            site.again_at = float("inf")
            for post in site.posts:
                if post.standing.state == "failed":
                    post.end()
                    post.lost = False
                    post.begin()

    def closed(self, site: Site) -> bool:
        """Stop a node's engines without waiting for them here; whether they have ended."""
        for post in site.posts:
            post.stop(self.config.timing.drain)
        if not all(post.ended() for post in site.posts):
            return False
        for post in site.posts:
            post.end()
        site.posts = []
        return True

    def _raise_if_nothing_serves(self) -> None:
        """End where nothing serves, nothing starts, and nothing is about to.

        Raises:
            TurbofitError: the first engine's failure.
        """
        if self._steps is not None or any(s.state == "joining" for s in self.sites.values()):
            return
        posts = [post for site in self.sites.values() for post in site.posts]
        alive = any(
            post.standing.state in ("starting", "ready") and not post.lost for post in posts
        )
        errors = [post.standing.error for post in posts if post.standing.error]
        if alive or not errors:
            self._hopeless = None
            return
        now = time.monotonic()
        self._hopeless = now if self._hopeless is None else self._hopeless
        if now - self._hopeless >= _SURE_SECONDS:
            raise error_from(errors[0])
