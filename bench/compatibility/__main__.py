"""Which versions of Transformers LMDeploy's front ends run with, family by family.

    python -m bench.compatibility [--lmdeploy 0.18.0 …] [--transformers 4.57.6 …]
        [--code NAME=FOLDER] [--cache FOLDER] [--write]

Installs each version into a folder of its own below ``--cache`` (60 MB a Transformers, 360 an
LMDeploy, which may be such a folder itself) and puts a pair of them before the environment that the
bench runs in, which needs torch, torchvision and what LMDeploy imports. Prints what is not as the
table has it; ``--write`` writes that there. ``--code NAME=FOLDER``: Python files and tokenizer that
an InternVL checkpoint publishes beside its weights; no other place has its config class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.compatibility.environments import demand, installed, probe
from bench.compatibility.jobs import make_jobs
from bench.compatibility.table import Outcome, fold, listed, render
from turbofit.core.presets import preset_path
from turbofit.planning.compatibility import FrontEnd

_CACHE = Path(tempfile.gettempdir()) / "turbofit-pairs"
_LMDEPLOY = ["0.16.0", "0.17.0", "0.18.0"]
_TRANSFORMERS = [
    "4.50.3", "4.53.3", "4.56.2", "4.57.6", "5.0.0", "5.3.0", "5.5.4", "5.6.2", "5.8.1", "5.10.4",
    "5.13.1", "5.17.0", "5.20.2", "5.23.0", "5.24.0",
]  # fmt: skip
_SOURCE = (
    "bench/compatibility: LMDeploy's own front ends and model classes over tiny checkpoints; torch"
    " 2.13.0 for CPUs, Python 3.11, no GPU"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compatibility", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--lmdeploy", nargs="+", default=_LMDEPLOY)
    parser.add_argument("--transformers", nargs="+", default=_TRANSFORMERS)
    parser.add_argument("--code", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--cache", type=Path, default=_CACHE)
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args()
    codes = {name: Path(path) for name, _, path in (text.partition("=") for text in options.code)}
    found: list[Outcome] = []
    allowed = set()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = make_jobs(Path(scratch), codes)
        for lmdeploy in options.lmdeploy:
            folder = Path(lmdeploy)
            if not folder.is_dir():
                folder = installed(options.cache, "lmdeploy", lmdeploy)
            allowed.add(demand(folder))
            for transformers in options.transformers:
                start = time.monotonic()
                folders = [installed(options.cache, "transformers", transformers), folder]
                answer = probe(folders, jobs, Path(scratch))
                outcomes = fold(folder.name.removeprefix("lmdeploy-"), transformers, answer)
                said = answer.get("failed") or "; ".join(filter(None, map(_news, outcomes)))
                name = f"{folder.name} {transformers} {time.monotonic() - start:.0f} s"
                print(f"{name}: {said or 'as listed'}", flush=True)
                found += outcomes
    if options.write:
        if len(allowed) > 1:
            raise SystemExit(f"LMDeploys that demand different versions: {allowed}")
        text = render([*listed(), *found], source=_SOURCE, allowed=allowed.pop())
        preset_path("engines", "compatibility").write_text(text, encoding="utf-8")
    return 0


def _news(one: Outcome) -> str:
    """What the table does not have, which answers for a new LMDeploy by the nearest older one."""
    known = FrontEnd(one.lmdeploy, one.architecture, one.engine).failure(one.transformers)
    if (one.step, one.error) == ((known.step, known.error) if known else ("", "")):
        return ""
    return f"{one.architecture} {one.engine} {one.step or 'runs'}: {one.error}"


if __name__ == "__main__":
    sys.exit(main())
