"""``python -m bench.gpu --out DIR [--stages a,b] [--left MIB] [--gpu N] [--seconds S]``.

The smallest and scarcest first. Each stage is a file in DIR and is not run again while the file is
there; what could not be run says why. Needs a GPU, torch with CUDA, nvidia-ml-py and, from b on,
LMDeploy. Commit DIR under ``bench/gpu/results``.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.gpu.stages import Ballast, constants, engine, environment

#: Stage b: what is planned and started. TurboMind first, then the PyTorch engine.
ENGINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2-vl-2b", {}),
    ("internvl3-8b-hf", {}),
    ("qwen2-vl-7b", {}),
    ("qwen2-vl-2b", {"engine": "pytorch"}),
    ("qwen3-vl-8b", {"engine": "pytorch"}),
)


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
    return {"machine": found, "packages": packages, "python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main(words: list[str] | None = None) -> int:
    """Exit 1: a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", default="a,b")
    parser.add_argument("--left", type=int, default=0, metavar="MIB", help="hold the rest back")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=240.0, help="a stage may take")
    parser.add_argument("--only", default="", help="of stage b, models whose name contains this")
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    environ, failed = environment(args.gpu), False

    def stage(name: str, act: Callable[[], dict[str, Any]]) -> None:
        nonlocal failed
        file = args.out / f"{name}.json"
        if file.exists():
            print(f"{name}: there already")
            return
        begun = time.monotonic()
        try:
            found: dict[str, Any] = act()
        except (OSError, RuntimeError, ValueError) as exc:
            found = {"code": None, "not_run": str(exc)}
        found["seconds"] = round(time.monotonic() - begun, 1)
        failed = failed or found.get("code") != 0
        file.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
        file.with_suffix(".part").rename(file)
        print(f"{name}: {_told(found)} in {found['seconds']:.0f} s", flush=True)

    stage("machine", lambda: {"code": 0, **machine()})
    with Ballast(args.left, args.gpu, environ) as ballast, tempfile.TemporaryDirectory() as scratch:
        label = f"-{args.left >> 10}g" if args.left else ""
        if "a" in args.stages.split(","):
            stage("a-constants", lambda: constants(args.gpu, args.seconds, environ))
        if "b" in args.stages.split(","):
            for model, settings in ENGINES:
                if args.only not in model:
                    continue
                folder = Path(scratch) / f"{model}-{settings.get('engine', 'auto')}"
                stage(
                    f"b-{model}-{settings.get('engine', 'auto')}{label}",
                    lambda m=model, f=folder, s=settings: {
                        "held_back": ballast.held,
                        **engine(m, f, args.gpu, args.seconds, environ, s),
                    },
                )
    return 1 if failed else 0


def _told(found: dict[str, Any]) -> str:
    if found.get("code") != 0:
        return f"failed ({found.get('not_run') or found.get('code')})"
    if found.get("over") is not None:
        return f"forecast {found['over'] / 2**20:+,.0f} MiB over what NVML saw"
    return "done"


if __name__ == "__main__":
    raise SystemExit(main())
