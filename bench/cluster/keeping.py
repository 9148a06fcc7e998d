"""What keeping a cluster costs its one process, against the number of nodes.

    python -m bench.cluster.keeping

Synthetic nodes, eight engines each, all ready: no Ray, no engine, no request. What Ray itself takes
for so many nodes and actors is not in it, and was not measured here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

from msgspec.structs import replace

from turbofit import api
from turbofit.core.cluster import Cluster, Node, NodePlan
from turbofit.core.struct import to_json
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.server import make_roll_gateway
from turbofit.launch.cluster.keeper import Keeper
from turbofit.launch.cluster.places import Places
from turbofit.launch.cluster.post import Post
from turbofit.launch.cluster.promise import expected_members, orders_of
from turbofit.launch.cluster.site import Site
from turbofit.launch.config import ClusterServeConfig
from turbofit.machine.spec import parse_spec
from turbofit.planning.request import PlanRequest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.keeping", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 100, 1000])
    args = parser.parse_args()
    heads = ("nodes", "engines", "roll, nothing new, ms", "roll, one engine new, ms",
             "gateway follows it, ms", "status, ms", "its JSON, MB")  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|")
    for nodes in args.nodes:
        keeper = kept(nodes)
        posts = [post for site in keeper.sites.values() for post in site.posts]
        keeper.roll()
        same = timed(keeper.roll)
        gateway = make_roll_gateway(keeper.roll(), GatewayConfig())

        def other(post: Post = posts[-1], keeper: Keeper = keeper) -> None:
            post.standing = replace(post.standing, gate=(post.standing.gate or 0) + 1)
            keeper.roll()

        fresh = timed(other)

        def followed(
            post: Post = posts[-1], keeper: Keeper = keeper, gateway: object = gateway
        ) -> None:
            post.standing = replace(post.standing, gate=(post.standing.gate or 0) + 1)
            gateway.follow(keeper.roll())

        follow = timed(followed) - fresh
        status = timed(lambda keeper=keeper: to_json(keeper.status(())))
        size = len(to_json(keeper.status(()))) / 1e6
        print(f"| {nodes:,} | {len(posts):,} | {same:.2f} | {fresh:.2f} | {follow:.2f} | "
              f"{status:.1f} | {size:.2f} |", flush=True)  # fmt: skip


def kept(nodes: int) -> Keeper:
    """A keeper of so many nodes that serve."""
    machine = parse_spec("8xrtx3090")
    cluster = Cluster(
        source="synthetic",
        nodes=tuple(
            Node(id=f"{n:016x}", name=f"n{n}", address=f"10.{n >> 8}.{n & 255}.1", machine=machine)
            for n in range(nodes)
        ),
    )
    plan = api.plan_cluster("internvl2-2b", cluster, concurrency=64 * nodes)
    config = ClusterServeConfig(request=PlanRequest(model="internvl2-2b"))
    here = SimpleNamespace(here="", here_address="10.0.0.1", address="synthetic")
    sites = [site_of(node, planned, plan, config)
             for node, planned in zip(cluster.nodes, plan.nodes, strict=True)]  # fmt: skip
    return Keeper(here, Places(), plan, sites, config, print, name="synthetic")


def site_of(node: Node, planned: NodePlan, plan: object, config: ClusterServeConfig) -> Site:
    """A node whose engines are ready."""
    site = Site(node)
    site.plan, site.state = planned, "serving"
    orders = orders_of(planned, plan, config, here=False, peers=())
    for order, member in zip(orders, expected_members(planned), strict=True):
        post = Post(order, None, share=member.share, host_bytes=member.host_bytes,
                    start=lambda *_: None)  # fmt: skip
        url = f"http://{node.address}:{20000 + len(site.posts)}"
        post.standing = replace(post.standing, state="ready", url=url, gate=member.gate)
        site.posts.append(post)
    return site


def timed(what: Callable[[], object], seconds: float = 0.5) -> float:
    """Milliseconds of one call, the best of several."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - began)
    return best * 1000


if __name__ == "__main__":
    main()
