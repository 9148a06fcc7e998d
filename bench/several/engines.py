"""``python -m bench.several.engines``: three models' real engines on one pretend card.

All are brought to their worst at the same moment, each is killed once, and what the card held is
put beside the joint plan.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common.processes import Child
from bench.common.serving import Served, image, serve_pretend
from turbofit.core.units import MIB
from turbofit.planning.joint_plan import JointPlan, joint_plan
from turbofit.planning.request import PlanRequest
from turbofit.pretend.shared import read_shared

_MODELS = ("internvl2-2b", "qwen2-vl-2b", "internvl2-1b")


def main() -> int:
    """Serve, ask, kill, and compare; 1 where something that must hold did not."""
    parser = argparse.ArgumentParser(prog="python -m bench.several.engines", description=__doc__)
    parser.add_argument("models", nargs="*", default=_MODELS)
    parser.add_argument("--on", default="1xrtx3090", help="one card")
    parser.add_argument("--requests", type=int, default=6, help="of each model, at once")
    given = parser.parse_args()
    plan = joint_plan([PlanRequest(model=name, on=given.on) for name in given.models])
    print(plan.verdict)
    if not plan.fits:
        return 1
    children: list[Child] = []
    # A folder of its own: the shared card lies in the temporary folder of the server.
    with tempfile.TemporaryDirectory(prefix="several-") as folder:
        state = Path(folder)
        served = serve_pretend(
            children, state, *given.models, "--on", given.on, TMPDIR=str(state)
        )  # fmt: skip
        try:
            return _run(served, state, plan, given)
        finally:
            for child in children:
                child.kill()


def _run(served: Served, state: Path, plan: JointPlan, given: Any) -> int:
    served.wait()
    for count in range(2, len(given.models) + 1):
        served.child.wait_for("phase: ready", count)
    names = [one["id"] for one in served.ask("/v1/models")[2]["data"]]
    (cards,) = state.glob("turbofit-cards-*/cards")
    answers = _ask_all(served, names, given.requests)
    print(f"all at once: {dict(answers)}")
    (gpu,) = plan.gpus
    forecast = gpu.used + sum(one.bytes - one.margin for one in gpu.models)
    peak = gpu.used + read_shared(cards).peak[0]
    print(
        f"GPU 0 at most: {peak / MIB:,.0f} MiB, planned {forecast / MIB:,.0f} MiB, of "
        f"{(gpu.total - gpu.reserved) / MIB:,.0f}"
    )
    bad = peak > forecast + 64 * MIB or set(answers) - {200, 429}
    for number, process in enumerate(p for p in read_shared(cards).processes if p.alive):
        began = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        served.child.wait_for("phase: ready", len(names) + 1 + number)
        print(f"process {process.pid} killed, ready again after {time.monotonic() - began:.1f} s")
    tokens = [line for line in served.child.lines if "KV tokens:" in line]
    for line in tokens:
        print(f"  {line}")
    bad = bad or any("+0.0%" not in line for line in tokens)
    again = _ask_all(served, names, given.requests)
    print(f"all at once again: {dict(again)}")
    print(f"GPU 0 at most: {(gpu.used + read_shared(cards).peak[0]) / MIB:,.0f} MiB")
    return int(bool(bad or set(again) - {200, 429}))


def _ask_all(served: Served, names: list[str], requests: int) -> Counter[int]:
    """The largest image to every model at the same moment; 429 is a full queue, as stated."""
    answers: Counter[int] = Counter()
    barrier = threading.Barrier(len(names) * requests)

    def ask(name: str) -> None:
        content = [{"type": "text", "text": "What is it?"}, image(4480, 4480)]
        body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 64}
        barrier.wait()
        status, _, _ = served.ask("/v1/chat/completions", body, timeout=300)
        answers[status] += 1

    threads = [threading.Thread(target=ask, args=(name,)) for name in names * requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


if __name__ == "__main__":
    sys.exit(main())
