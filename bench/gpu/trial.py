"""One start of an engine with given settings, in a process of its own: what it took, or its death.

``python -m bench.gpu.trial PLAN OUT [--load SPEC]``: PLAN is a turbofit plan, whose settings are
started as they are, fitting or not. Every worst case of its limits is driven as
`turbofit calibrate` does, or a load as ``bench.gpu.load`` says. OUT gets a document after every
step, so that a trial that is ended from outside leaves what it saw; its outcome is ``out_of_time``.
LMDeploy is started again as often as `turbofit serve` does, and ``restarts`` tells why; one that
ended under a load did not survive it. An engine dies with this process.
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
from turbofit.core.plan import Plan
from turbofit.core.process.files import write_atomic
from turbofit.core.struct import to_builtins
from turbofit.gateway.config import GatewayConfig
from turbofit.launch.calibrate.calibrator import Calibrator, NvmlUsageReader, Progress
from turbofit.launch.engine.engine_log import EndedError
from turbofit.launch.engine.environment import Lmdeploy, find_lmdeploy, module_runner
from turbofit.launch.engine.launches import free_ports
from turbofit.launch.engine.supervised_engine import SupervisedEngine, Timing
from turbofit.launch.engine.worst_requests import ProbeRequest
from turbofit.launch.run import Run, Start
from turbofit.launch.serve.config import ServeConfig
from turbofit.launch.serve.leases import Leases
from turbofit.launch.serve.supervisor import StoppedError, StopSignal
from turbofit.observe.calibration import phase_rows

__all__ = ["main"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Out:
    """The document, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, dict[str, Any]()

    def add(self, **facts: Any) -> None:
        self.facts |= facts
        write_atomic(self.path, json.dumps(self.facts, indent=1) + "\n")


class Loaded:
    """An examiner that keeps where the engine is, for a load that goes straight at it."""

    def __init__(self) -> None:
        self.direct: tuple[str, str | None] | None = None

    def begin(self, plan: Plan) -> None:
        """Nothing is read before it starts."""

    def examine(
        self, engine: SupervisedEngine, model: str, ask: Callable[[ProbeRequest], int]
    ) -> None:
        """It is up."""
        del model, ask
        self.direct = engine.url, engine.client.key


class Trial:
    """What is done once the engine is ready, and what became of it."""

    def __init__(
        self, plan: Plan, out: Out, load: Load | None, stop: StopSignal, begun: float
    ) -> None:
        self.plan, self.out, self.load, self.stop, self.begun = plan, out, load, stop, begun
        self.mended = list[str]()
        self.loaded = Loaded()
        #: How often it had been started again when it was ready, and when all was asked.
        self.ready, self.done = list[int](), list[int]()

    def ended(self, why: str) -> None:
        """An engine ended that another start mends."""
        self.mended.append(why)
        self.out.add(restarts=self.mended)

    def opened(self, urls: list[str]) -> None:
        """It is ready: without a load it has been driven, and that was it."""
        self.out.add(ready=time.monotonic() - self.begun)
        self.ready.append(len(self.mended))
        if self.load is None:
            self.finish()
        elif len(self.ready) == 1:
            threading.Thread(target=self.through, args=(urls, self.load), daemon=True).start()

    def through(self, urls: list[str], load: Load) -> None:
        """The load, each way in turn."""
        ways: dict[str, tuple[str, str | None]] = {"gateway": (urls[0], None)}
        if self.loaded.direct is not None:
            ways["direct"] = self.loaded.direct
        try:
            self.out.add(**drive(self.plan, self.plan.model.name, ways, load))
        finally:
            self.finish()

    def finish(self) -> None:
        """All was asked, unless somebody ended it before."""
        if self.stop.signal is None:
            self.done.append(len(self.mended))
        self.stop.end()

    @property
    def outcome(self) -> str:
        """Of one that came back in order; what ended under a load did not survive it."""
        if not self.done:
            return "out_of_time"
        return "crash" if self.done[-1] > self.ready[0] else "survived"


def run(plan: Plan, out: Out, load: Load | None) -> str:
    """Start, drive, end; the outcome in a word."""
    begun = time.monotonic()
    progress = Progress(plan.model.name, {"at": begun}, pretend=False)
    calibrator = Calibrator(NvmlUsageReader, progress, say)
    gateway = None
    if load is not None and "gateway" in load.ways:
        gateway = GatewayConfig(port=free_ports(1)[0])
    with StopSignal() as stop, Leases() as leases, ExitStack() as stack:
        trial = Trial(plan, out, load, stop, begun)
        lmdeploy = find_lmdeploy()
        chat = plan.model.architecture == "InternVLChatModel"
        runner = module_runner("bench.gpu.chat") if chat else lmdeploy.argv
        config = ServeConfig(
            plan=plan, gateway=gateway, port=0, model_name=plan.model.name,
            timing=Timing(drain=5.0, liveness=0.0),
        )  # fmt: skip
        started = Run(
            config, leases, say, on_open=trial.opened, on_death=trial.ended,
            lmdeploy=Lmdeploy(lmdeploy.version, runner),
            examiner=calibrator if load is None else trial.loaded,
        )  # fmt: skip
        started.plan, started.fetch = plan, None
        folder = out.path.with_suffix(".run")
        folder.mkdir(exist_ok=True)
        started.begin(folder)
        started.record.begin(number=0)
        out.add(outcome="running", settings=to_builtins(plan.settings), restarts=[])
        try:
            Start(started, plan, 0).run(stop, stack)
            outcome = trial.outcome
        except EndedError as exc:
            outcome = "died" if exc.ending.is_oom else exc.ending.kind
            out.add(ending=exc.ending.record())
        finally:
            calibrator.end()
            out.add(
                phases=phase_rows(plan, progress.seen), seen=to_builtins(progress.seen),
                moments=to_builtins(started.record.run.attempts[-1].moments),
            )  # fmt: skip
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
