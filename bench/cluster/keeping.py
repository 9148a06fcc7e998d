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
from turbofit.gateway.server import make_routing_table_gateway
from turbofit.launch.cluster.controller import Controller
from turbofit.launch.cluster.node_state import NodeState
from turbofit.launch.cluster.places import Places
from turbofit.launch.cluster.promise import engine_specs_of, expected_members
from turbofit.launch.cluster.replica import Replica
from turbofit.launch.serve.config import ClusterServeConfig
from turbofit.machine.spec import parse_spec
from turbofit.planning.request import PlanRequest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.keeping", description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 100, 1000])
    args = parser.parse_args()
    heads = (
        "nodes", "engines", "routing table, nothing new, ms", "routing table, one engine new, ms",
        "gateway follows it, ms", "status, ms", "its JSON, MB",
    )  # fmt: skip
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|")
    for nodes in args.nodes:
        controller = kept(nodes)
        replicas = [
            replica
            for node_state in controller.node_states.values()
            for replica in node_state.replicas
        ]
        controller.routing_table()
        same = timed(controller.routing_table)
        gateway = make_routing_table_gateway(controller.routing_table(), GatewayConfig())

        def other(replica: Replica = replicas[-1], controller: Controller = controller) -> None:
            replica.engine_state = replace(
                replica.engine_state, gate=(replica.engine_state.gate or 0) + 1
            )
            controller.routing_table()

        fresh = timed(other)

        def followed(
            replica: Replica = replicas[-1],
            controller: Controller = controller,
            gateway: object = gateway,
        ) -> None:
            replica.engine_state = replace(
                replica.engine_state, gate=(replica.engine_state.gate or 0) + 1
            )
            gateway.follow(controller.routing_table())

        follow = timed(followed) - fresh
        status = timed(lambda controller=controller: to_json(controller.status(())))
        size = len(to_json(controller.status(()))) / 1e6
        print(f"| {nodes:,} | {len(replicas):,} | {same:.2f} | {fresh:.2f} | {follow:.2f} | "
              f"{status:.1f} | {size:.2f} |", flush=True)  # fmt: skip


def kept(nodes: int) -> Controller:
    """A controller of so many nodes that serve."""
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
    node_states = [node_state_of(node, planned, plan, config)
             for node, planned in zip(cluster.nodes, plan.nodes, strict=True)]  # fmt: skip
    return Controller(here, Places(), plan, node_states, config, print, name="synthetic")


def node_state_of(
    node: Node, planned: NodePlan, plan: object, config: ClusterServeConfig
) -> NodeState:
    """A node whose engines are ready."""
    node_state = NodeState(node)
    node_state.plan, node_state.state = planned, "serving"
    engine_specs = engine_specs_of(planned, plan, config, here=False, peers=())
    for engine_spec, member in zip(engine_specs, expected_members(planned), strict=True):
        replica = Replica(engine_spec, None, share=member.share, host_bytes=member.host_bytes,
                    start=lambda *_: None)  # fmt: skip
        url = f"http://{node.address}:{20000 + len(node_state.replicas)}"
        replica.engine_state = replace(
            replica.engine_state, state="ready", url=url, gate=member.gate
        )
        node_state.replicas.append(replica)
    return node_state


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
