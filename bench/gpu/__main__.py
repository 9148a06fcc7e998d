"""``python -m bench.gpu --out DIR [--stages a,b,s,c,p] [--left MIB] [--gpu N] [--limit SECONDS]``.

The smallest and scarcest first. Each stage is a file in DIR and is not run again while the file is
there; what was not run is listed in ``not-run.json``, and why. Needs a GPU, torch with CUDA,
nvidia-ml-py and, from b on, LMDeploy. Commit DIR under ``bench/gpu/results``;
``--held-against DIR`` tells anywhere what it means.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.gpu.held import Options, hold
from bench.gpu.run import Run, write
from bench.gpu.stages import (
    CONTEXTS,
    Ballast,
    constants,
    engine,
    environment,
    runtime,
    speed,
)  # fmt: skip
from bench.gpu.stages_bc import Stages
from bench.gpu.summary import summary
from turbofit.core.errors import TurbofitError
from turbofit.observe.calibrations import pretends

#: Stage b's pipelines: what is planned and started in one process, as `turbofit.pipeline` does.
PIPELINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2-vl-2b", {}),
    ("internvl3-8b-hf", {}),
    ("qwen2-vl-7b", {}),
    ("qwen2-vl-2b", {"engine": "pytorch"}),
    ("qwen3-vl-8b", {"engine": "pytorch"}),
)
#: Models whose prefill, steps and images are timed apart; the small one tells what layers cost.
SPEEDS = ("internvl2-8b", "qwen2-vl-2b", "qwen2-vl-7b")


def machine() -> dict[str, Any]:
    """What the figures are of."""
    from turbofit.core.struct import to_builtins
    from turbofit.machine.source import machine_from

    found = dict(to_builtins(machine_from(None)))
    for gpu in found["gpus"]:
        gpu.pop("uuid", None)
        gpu["holders"] = []
    names = ("torch", "lmdeploy", "transformers", "triton", "turbofit")
    packages = {name: _version(name) for name in names}
    pretend = {"pretend": True} if pretends() else {}
    return {"machine": found, "packages": packages, "python": platform.python_version(), **pretend}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="the folder of documents")
    parser.add_argument(
        "--held-against", type=Path, metavar="DIR", help="kept results, without a GPU: see held.py"
    )
    parser.add_argument(
        "--stages", default="a,b,s,c,p", help="letters; s: speed, p: pipelines, t: tuning"
    )
    parser.add_argument("--left", type=int, default=0, metavar="MIB", help="hold the rest back")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=240.0, help="a stage's program may take")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds that all may take")
    parser.add_argument("--only", default="", metavar="PATTERN", help="stages whose name has it")
    parser.add_argument("--requests", type=int, default=200, help="of a load of stage c")
    parser.add_argument("--step", type=int, default=4, help="of the oracle, in thousandths")
    parser.add_argument("--no-rehearse", action="store_true", help="no rehearsals beside trials")
    args = parser.parse_args(words)
    if args.out is None and args.held_against is None:
        parser.error("give --out DIR, or --held-against DIR for results that are there")
    return args


def main(words: list[str] | None = None) -> int:
    """Exit 1: a stage failed; 2: it could not begin; 130: Ctrl-C: the same goes on from there."""
    args = _arguments(words)
    if args.held_against is not None:
        return _hold(args)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.limit, args.stages, args.only)
    try:
        with tempfile.TemporaryDirectory(prefix="turbofit-bench-") as folder:
            _stages(args, run, Path(folder))
    except (TurbofitError, ValueError) as exc:
        print(f"bench.gpu: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        run.close()
        (args.out / "SUMMARY.md").write_text(summary(args.out))
    return 1 if run.failed else 0


def _hold(args: argparse.Namespace) -> int:
    options = Options(args.only, not args.no_rehearse, args.seconds, args.limit)
    try:
        print(hold(args.held_against, options, args.out), end="")
    except (TurbofitError, ValueError) as exc:
        print(f"bench.gpu: {exc}", file=sys.stderr)
        return 2
    return 0


def _stages(args: argparse.Namespace, run: Run, scratch: Path) -> None:
    # What this machine has learned before must not help the forecast that is judged here.
    scratch_folders = {
        "XDG_STATE_HOME": str(scratch / "state"),
        "TURBOFIT_LEASES": str(scratch / "leases"),
    }
    environ = {**environment(args.gpu), **scratch_folders}
    os.environ.update(environ)
    if not (args.out / "machine.json").exists():
        write(args.out / "machine.json", {"code": 0, **machine()})
    label = f"-{args.left >> 10}g" if args.left else ""

    def room() -> float:
        """What a stage's program may take now."""
        return min(float(args.seconds), run.left)

    with Ballast(args.left, args.gpu, environ) as ballast:
        if ballast.left is not None:
            print(f"held back: {ballast.held >> 20} MiB; left: {ballast.left >> 20} MiB")
        if run.wants("a"):
            run.stage("a-constants", lambda: constants(args.gpu, room(), environ))
            for name, parts in (
                ("context", CONTEXTS), ("handles", ("handles",)), ("pool", ("pool",)),
            ):  # fmt: skip
                run.stage(
                    f"a-{name}", lambda p=parts: runtime(p, args.gpu, room, environ)
                )  # fmt: skip
        stages = Stages(
            run, scratch, args.seconds, environ, label, args.requests,
            rehearse=not args.no_rehearse, step=args.step,
        )  # fmt: skip
        stages.all()
        for model in SPEEDS if run.wants("s") else ():
            run.stage(
                f"s-{model}-turbomind{label}",
                lambda m=model: speed(m, scratch / f"speed-{m}", args.gpu, room(), environ),
            )
        for model, settings in PIPELINES:
            if not run.wants("p"):
                continue
            name = f"{model}-{settings.get('engine', 'auto')}"
            run.stage(
                f"p-{name}{label}",
                lambda m=model, n=name, s=settings: {
                    "held_back": ballast.held, "left": ballast.left,
                    **engine(m, scratch / n, args.gpu, room(), environ, s),
                },
            )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
