"""Which versions of Transformers LMDeploy's front ends run with, family by family.

    python -m bench.compatibility [--lmdeploy 0.18.0 …] [--transformers 4.57.6 …] [--only WORD …]
        [--code NAME=FOLDER] [--cache FOLDER] [--keep FILE] [--table]

Installs each version into a folder of its own below ``--cache`` (60 MB a Transformers, 360 an
LMDeploy) and puts a pair of them before the environment that the bench runs in, which needs torch,
torchvision and what LMDeploy imports. ``--code NAME=FOLDER``: Python files and tokenizer that an
InternVL checkpoint publishes beside its weights; no other place has its config class.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.compatibility.environments import demand, installed, probe
from bench.compatibility.jobs import make_jobs
from bench.compatibility.table import fold, read, render

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
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--code", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--cache", type=Path, default=_CACHE)
    parser.add_argument("--keep", type=Path, default=Path("compatibility.jsonl"))
    parser.add_argument("--table", action="store_true", help="only write the table from --keep")
    options = parser.parse_args()
    codes = {name: Path(path) for name, _, path in (text.partition("=") for text in options.code)}
    root = Path(__file__).resolve().parents[2]
    if options.table:
        path = root / "presets/engines/compatibility.yaml"
        allowed = {demand(installed(options.cache, "lmdeploy", one)) for one in options.lmdeploy}
        if len(allowed) > 1:
            raise SystemExit(f"LMDeploys that demand different versions: {allowed}")
        text = render(fold(read(options.keep)), source=_SOURCE, allowed=allowed.pop())
        path.write_text(text, encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as scratch, options.keep.open("a") as file:
        jobs = make_jobs(Path(scratch), options.only, codes)
        for lmdeploy in options.lmdeploy:
            for transformers in options.transformers:
                folders = [
                    installed(options.cache, "transformers", transformers),
                    installed(options.cache, "lmdeploy", lmdeploy),
                ]
                start = time.monotonic()
                found = probe(folders, jobs, Path(scratch))
                found |= {"pair": [lmdeploy, transformers]}
                print(json.dumps(found), file=file, flush=True)
                said = _line(found)
                print(f"{lmdeploy} {transformers} {time.monotonic() - start:.0f} s: {said}")
    return 0


def _line(found: dict) -> str:
    if "failed" in found:
        return str(found["failed"])
    bad = [
        f"{name} {engine} {told[engine]['step']}: {told[engine]['error']}"
        for name, told in found["families"].items()
        for engine in ("turbomind", "pytorch")
        if told.get(engine)
    ]
    return "; ".join(bad) or "all"


if __name__ == "__main__":
    sys.exit(main())
