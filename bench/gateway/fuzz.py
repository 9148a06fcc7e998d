"""Bent bodies over all routes of the ASGI app, and some into LMDeploy's own preprocessing.

    python -m bench.gateway.fuzz [--bodies 100000] [--real 2000] [--seed 1]

Counts no 5xx of ours and nothing past the limits upstream; the first offence ends the run with the
seed that found it. ``--real`` needs LMDeploy 0.18 (CPU torch is enough).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
import warnings
from pathlib import Path

from bench.common.gateway import PATCHES, TILES
from bench.common.judge import check_body

CASES = (
    ("InternVL, 12 tiles", TILES, {"limit": 12}, True),
    ("InternVL, 4 tiles, no overlay", TILES, {"limit": 4}, False),
    ("Qwen2-VL, 1,003,520 pixels", PATCHES, {"limit": 1_003_520}, True),
    ("Qwen2-VL, 602,112 pixels, no overlay", PATCHES, {"limit": 602_112}, False),
)


def resident() -> float:
    """Resident memory in MiB, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


async def app_side(bodies: int, seed: int) -> None:
    from bench.common.gateway import call, gateway, plan_for
    from bench.common.mutations import Mutator
    from turbofit.gateway.limits.request_limits import model_default

    each = bodies // len(CASES)
    print("| case | bodies | passed on | refused | images passed on | memory, MiB |")
    print("|---|---|---|---|---|---|")
    for number, (name, rule, limits, overlaid) in enumerate(CASES):
        plan = plan_for(rule, **limits)
        app, recorder = gateway(plan, overlay=overlaid)
        mutator = Mutator(seed * 1000 + number)
        default = model_default(app.bounds)
        passed = images = 0
        memory = []
        for count in range(each):
            path, raw = mutator.request()
            reply = await call(app, path, raw=raw, method="POST")
            assert reply.status < 500, (seed, number, count, reply.body)
            if recorder.seen:
                passed += 1
                sent = recorder.seen[-1][3]
                check_body(rule, plan.limits, default, path, sent)
                images += sent.count(b"data:image/")
            else:
                assert reply.status >= 400
            recorder.seen.clear()
            recorder.answers.clear()
            if count % (each // 4) == each // 4 - 1:
                memory.append(f"{resident():.0f}")
        assert all(engine.units == engine.host_bytes == 0 for engine in app.engines)
        print(
            f"| {name} | {each:,} | {passed:,} | {each - passed:,} | {images:,} | "
            f"{', '.join(memory)} |",
            flush=True,
        )


def real_side(bodies: int, seed: int) -> None:
    import torch

    from bench.common.lmdeploy_front import drive, loaded, make, plan_of
    from turbofit.gateway.overlay import overlay

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    cases = (
        ("internvl", 6, True), ("internvl", 6, False), ("internvl-hf", 6, True),
        ("internvl-hf", 6, False), ("qwen2-vl", 602_112, True), ("qwen2-vl", 602_112, False),
    )  # fmt: skip
    print("\n| LMDeploy's own preprocessing | bodies | passed on | images | most tokens of one |")
    print("|---|---|---|---|---|")
    for number, (family, limit, overlaid) in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            made = make(family, Path(folder))
            plan = plan_of(made, limit)
            with overlay(plan, Path(folder) / "o") as over:
                model = loaded(over if overlaid else made)
                each = bodies // len(cases)
                reached, passed = asyncio.run(
                    drive(plan, model, count=each, seed=seed * 77 + number, overlaid=overlaid)
                )
        how = "" if overlaid else ", no overlay"
        print(
            f"| {family}, limit {limit}{how} | {each} | {passed} | {len(reached)} | "
            f"{max(reached, default=0)} of "
            f"{plan.limits.image_tokens_per_request // plan.limits.images_per_request} |",
            flush=True,
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(prog="python -m bench.gateway.fuzz", description=__doc__)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--real", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.perf_counter()
    print(f"seed {args.seed}\n")
    if args.bodies:
        asyncio.run(app_side(args.bodies, args.seed))
    if args.real:
        real_side(args.real, args.seed)
    print(f"\n{time.perf_counter() - began:.0f} s; no 5xx, nothing past the limits")


if __name__ == "__main__":
    main()
