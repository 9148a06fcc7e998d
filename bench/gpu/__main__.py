"""Checks and keeps documents of `report --share`, and compares real cards with forecasts.

``check FILE...`` says why documents cannot be of a real card (exit 1). ``fold FILE...`` stores all
others in bench/gpu/observations, and renews the table of docs/accuracy.md. ``table`` only renews
the table. ``held`` prints each term of the stored runs beside its forecast, the constants that the
runs imply, and the presets that would change.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench.gpu.check import impossible
from bench.gpu.held import hold
from bench.gpu.results import OBSERVATIONS, read, trials
from bench.gpu.table import write
from turbofit.core.errors import TurbofitError
from turbofit.core.struct import to_json
from turbofit.report.share import SharedRun


def main(words: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    acts = parser.add_subparsers(dest="act", required=True)
    for act in ("check", "fold"):
        acts.add_parser(act).add_argument("files", nargs="+", type=Path)
    acts.add_parser("table")
    acts.add_parser("held")
    given = parser.parse_args(words)
    if given.act == "table":
        write()
    elif given.act == "held":
        print(hold(trials()), end="")
    else:
        return _checked(given.files, keep=given.act == "fold")
    return 0


def _checked(files: list[Path], *, keep: bool) -> int:
    good = True
    for file in files:
        try:
            document = read(file)
        except (TurbofitError, OSError) as exc:
            print(f"{file}: {exc}")
            good = False
            continue
        wrong = impossible(document)
        good = good and not wrong
        for reason in wrong:
            print(f"{file}: {reason}")
        if not wrong and keep:
            print(_kept(document))
    if keep:
        write()
    return 0 if good else 1


def _kept(document: SharedRun) -> Path:
    """Store a document under a name made of what was measured; returns its path."""
    plan, run = document.plan, document.run
    words = f"{plan.machine.name} {plan.model.name} {plan.backend.name} {run.started}"
    name = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    OBSERVATIONS.mkdir(exist_ok=True)
    path = OBSERVATIONS / f"{name}.json"
    path.write_text(to_json(document), encoding="utf-8")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
