"""Planning time and size of the plan against the number of nodes, on synthetic snapshots.

    python -m bench.cluster.planning            # the table, as Markdown
    python -m bench.cluster.planning --loss     # what folding differently full nodes costs

Cases: (a) all nodes alike; (b) eight kinds of machine, others hold up to 2 GiB of each card, in
MiB, at random; (c) the same machines, up to 8 GiB of each card, odd to the byte. Nothing is
measured of real cards: the machines are presets, the random numbers seeded. Each row is a process
of its own, so that nothing is remembered from the one before.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time

from msgspec.structs import replace

from turbofit import api
from turbofit.core.cluster import Cluster, Node
from turbofit.core.machine import Machine
from turbofit.core.struct import known
from turbofit.core.units import GIB, MIB
from turbofit.machine.spec import parse_spec

COUNTS = (1, 10, 100, 1000)
KINDS = (
    "4xrtx3090", "2xrtx4090", "8xrtx3090", "4xa100", "8xh100", "4xl4", "8xrtx2080ti", "2xrtxa6000",
)  # fmt: skip
CASES = {"a": (KINDS[:1], 0, MIB), "b": (KINDS, 2 * GIB, MIB), "c": (KINDS, 8 * GIB, 1)}
MODELS = ("internvl2-8b", "qwen2-vl-7b")
REQUESTS = 8
#: Nodes that are also planned one by one, which takes up to two seconds each.
COMPARED = 24


def synthetic(case: str, count: int) -> Cluster:
    """So many nodes of a case, the same ones every time."""
    kinds, most, unit = CASES[case]
    chance = random.Random(20261121)
    nodes = []
    for number in range(count):
        machine = parse_spec(kinds[number % len(kinds)])
        gpus = tuple(replace(g, uuid=f"GPU-{number}-{g.index}") for g in machine.gpus)
        machine = replace(machine, name=f"node-{number}", source="nvml", gpus=gpus)
        used = [chance.randrange(most // unit) * unit if most else 0 for _ in gpus]
        machine = held(machine, used)
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        nodes.append(Node(id=f"{number:06x}", name=machine.name, address=address, machine=machine))
    return Cluster(source="synthetic", nodes=tuple(nodes))


def held(machine: Machine, used: list[int]) -> Machine:
    """The machine with so much of each card held by others."""
    gpus = tuple(
        replace(gpu, used=size, free=known(gpu.total, 0) - known(gpu.reserved, 0) - size)
        for gpu, size in zip(machine.gpus, used, strict=True)
    )
    return replace(machine, gpus=gpus)


def one(model: str, case: str, count: int) -> dict[str, object]:
    """One row, in this process."""
    cluster = synthetic(case, count)
    api.plan(model, on="1xh100")  # what is read from presets once
    start = time.perf_counter()
    plan = api.plan_cluster(model, cluster, concurrency=REQUESTS * count)
    planned = time.perf_counter()
    text = plan.to_json()
    written = time.perf_counter()
    used = [node.plan for node in plan.nodes if node.plan is not None]
    return {
        "seconds": planned - start,
        "json_seconds": written - planned,
        "json_mb": len(text) / 1e6,
        "kinds": len({(plan.settings, plan.parallel.groups, plan.by_group) for plan in used}),
        "used": len(used),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def loss(model: str, case: str, count: int) -> dict[str, object]:
    """The folded plan beside the same nodes planned by themselves, under the same promise."""
    cluster = synthetic(case, count)
    plan = api.plan_cluster(model, cluster, concurrency=REQUESTS * count)
    limits = plan.limits
    assert limits is not None
    mine = theirs = 0
    mine_rate = their_rate = 0.0
    for node, node_plan in zip(cluster.nodes, plan.nodes, strict=True):
        if node_plan.plan is None:
            continue
        alone = api.plan(
            model,
            on=node.machine,
            context=plan.longest_request_tokens,
            concurrency=max(1, round(node_plan.at_once)),
            max_dynamic_patch=limits.max_dynamic_patch,
            max_pixels=limits.max_pixels_per_image,
        )
        assert node_plan.plan.fits
        assert alone.fits
        mine += node_plan.plan.kv.total_tokens
        theirs += alone.kv.total_tokens
        mine_rate += (
            node_plan.plan.throughput.requests_per_second if node_plan.plan.throughput else 0
        )
        their_rate += alone.throughput.requests_per_second if alone.throughput else 0
    return {"tokens": mine / theirs, "rate": mine_rate / their_rate}


def run(*words: str) -> dict[str, float]:
    """A row in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.cluster.planning", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster.planning", description=__doc__)
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--row", nargs=4)
    args = parser.parse_args()
    if args.row:
        what, model, case, count = args.row
        made = (one if what == "one" else loss)(model, case, int(count))
        print(json.dumps(made))
        return
    if args.loss:
        print("| model | case | nodes | KV tokens | requests/s |\n|---|---|---|---|---|")
        for model in MODELS:
            for case in ("b", "c"):
                row = run("--row", "loss", model, case, str(COMPARED))
                print(
                    f"| {model} | {case} | {COMPARED} | {row['tokens']:.3f} | {row['rate']:.3f} |",
                    flush=True,
                )
        return
    print(
        "| model | case | nodes | used | planned as | seconds | JSON MB | JSON s | peak MB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for model in MODELS:
        for case in CASES:
            for count in COUNTS:
                row = run("--row", "one", model, case, str(count))
                print(
                    f"| {model} | {case} | {count:,} | {row['used']:,} | {row['kinds']} |"
                    f" {row['seconds']:.2f} | {row['json_mb']:.1f} | {row['json_seconds']:.2f} |"
                    f" {row['peak_mb']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
