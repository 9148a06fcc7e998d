"""One start of an engine with given settings, in a process of its own: what it took, or its death.

``python -m bench.gpu.trial PLAN OUT [--load SPEC]``: PLAN is a turbofit plan, whose settings are
started as they are, fitting or not. Every worst case of its limits is driven as
`turbofit calibrate` does, or a load as ``bench.gpu.load`` says. OUT gets a document after every
step, so that a trial that is ended from outside leaves what it saw. An engine dies with this
process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gpu.load import Load, drive
from turbofit.core.errors import TurbofitError
from turbofit.core.files import write_atomic
from turbofit.core.plan import Plan
from turbofit.core.state import new_folder
from turbofit.core.struct import to_builtins
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.attempt import Attempt
from turbofit.launch.calibrator import Calibrator
from turbofit.launch.endings import EndedError
from turbofit.launch.engine import Engine, Timing
from turbofit.launch.environment import find_lmdeploy
from turbofit.launch.launches import free_ports
from turbofit.launch.leases import Leases
from turbofit.launch.meter import NvmlMeter
from turbofit.launch.progress import Progress
from turbofit.launch.readiness import Question
from turbofit.launch.record import Record
from turbofit.launch.runner import module_runner
from turbofit.launch.serve import Stop, StoppedError
from turbofit.launch.session import Job
from turbofit.observe.calibration import phase_rows

__all__ = ["main"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Loaded:
    """An examiner that drives a load straight at the engine."""

    def __init__(self, load: Load, done: Callable[[dict[str, Any]], None]) -> None:
        self.load, self.done = load, done

    def begin(self, plan: Plan) -> None:
        self.plan = plan

    def examine(self, engine: Engine, model: str, ask: Callable[[Question], int]) -> None:
        del ask
        if "direct" in self.load.ways:
            self.done(drive(self.plan, model, engine.url, engine.client.key, self.load))


class Out:
    """The document, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, dict[str, Any]()

    def add(self, **facts: Any) -> None:
        self.facts |= facts
        write_atomic(self.path, json.dumps(self.facts, indent=1) + "\n")


def run(plan: Plan, out: Out, load: Load | None) -> str:
    """Start, drive, end; the outcome in a word."""
    begun = time.monotonic()
    folder = new_folder("runs", "trial")
    progress = Progress(plan.model.name, {"at": begun}, pretend=False)
    meter, thread = NvmlMeter(), list[threading.Thread]()
    examiner: Any = Calibrator(meter, progress, say)
    gateway = None
    if load is not None:
        examiner = Loaded(load, lambda found: out.add(direct=found))
        if "gateway" in load.ways:
            gateway = GatewayConfig(port=free_ports(1)[0])
    with Stop() as stop, Leases() as leases, ExitStack() as stack:

        def opened(urls: list[str]) -> None:
            out.add(ready=time.monotonic() - begun)
            if load is None or gateway is None:
                stop.end()
                return

            def through() -> None:
                assert load is not None
                try:
                    out.add(gateway=drive(plan, plan.model.name, urls[0], None, load))
                finally:
                    stop.end()

            thread.append(threading.Thread(target=through, daemon=True))
            thread[0].start()

        lmdeploy = find_lmdeploy()
        chat = plan.model.architecture == "InternVLChatModel"
        runner = module_runner("bench.gpu.chat") if chat else lmdeploy.argv
        job = Job(
            folder=folder, record=Record(folder, model=plan.model.name), say=say, on_open=opened,
            lmdeploy=lmdeploy.version, runner=runner,
            timing=Timing(drain=5.0, liveness=0.0, restarts=0), leases=leases,
            gateway=gateway, port=0, name=plan.model.name, examiner=examiner,
        )  # fmt: skip
        job.record.begin(number=0)
        out.add(outcome="running", settings=to_builtins(plan.settings))
        try:
            Attempt(job, plan, 0).run(stop, stack)
            outcome = "survived"
        except EndedError as exc:
            outcome = "died" if exc.ending.of_memory else exc.ending.kind
            out.add(ending=exc.ending.record())
        finally:
            meter.end()
            out.add(phases=phase_rows(plan, progress.seen), seen=to_builtins(progress.seen))
    out.add(outcome=outcome, seconds=round(time.monotonic() - begun, 1))
    return outcome


def main(words: list[str]) -> int:
    """0: it survived or died, which is an answer; 1: neither."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.trial")
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--load", default="")
    args = parser.parse_args(words)
    plan, out = Plan.from_json(args.plan.read_bytes()), Out(args.out)
    load = Load(**json.loads(args.load)) if args.load else None
    try:
        outcome = run(plan, out, load)
    except (TurbofitError, StoppedError, OSError) as exc:
        out.add(outcome="failed", why=str(exc)[:500])
        return 1
    return 0 if outcome in ("survived", "died") else 1


if __name__ == "__main__":
    # Engines are told apart by their groups, and end with this one.
    os.environ.setdefault("LMDEPLOY_ENABLE_CHECK_ENV", "0")
    raise SystemExit(main(sys.argv[1:]))
