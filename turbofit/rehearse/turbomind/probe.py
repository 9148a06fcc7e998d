"""Rehearses and writes what it saw: ``python -m turbofit.rehearse.turbomind.probe SPEC OUT``."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.json_types import Document
from turbofit.pretend.errors import PretendError
from turbofit.pretend.symbols import Symbols
from turbofit.pretend.timeline import read_timeline, timeline_is_full
from turbofit.rehearse.installed import engine_library
from turbofit.rehearse.turbomind.ledger import Ledger
from turbofit.rehearse.turbomind.report import report
from turbofit.rehearse.turbomind.run import new_folder, run_child
from turbofit.rehearse.turbomind.sites import CallSites
from turbofit.rehearse.turbomind.spec import Spec, load_spec


def rehearse(spec: Spec, keep: Path | None = None) -> Document:
    """Runs a rehearsal and returns the document that the probe writes; sizes are bytes.

    Args:
        spec: what to rehearse.
        keep: where to leave the timeline and the engine's log; by default they are removed.
    """
    if not (spec.model_dir / "config.json").exists():
        raise UsageError(
            f"{spec.model_dir} has no config.json",
            hint="give a checkpoint folder, or make one: "
            "python -m turbofit.rehearse.checkpoint.twin",
        )
    folder = new_folder()
    try:
        outcome = run_child(spec, folder)
        scenario = spec.machine
        sites = CallSites(Symbols(engine_library()).name)
        ledger = Ledger(len(scenario.gpus), sites, scenario.pool_step)
        timeline = folder / "timeline"
        if timeline.exists() and timeline_is_full(timeline):
            raise PretendError(
                f"the timeline of {scenario.timeline_limit} bytes is full",
                hint="rehearse fewer requests at once, or give the machine a timeline_limit",
            )
        ledger.read(read_timeline(timeline) if timeline.exists() else ())
        document = report(spec, outcome, ledger)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            for name in ("timeline", "stderr", "report.json"):
                if (folder / name).exists():
                    _copy(folder / name, keep / name)
            document["files"] = str(keep)
        return document
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copies a file up to its first zero byte (timelines have a fixed length)."""
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(1 << 20):
            end = chunk.find(b"\0") if source.name == "timeline" else -1
            write.write(chunk if end < 0 else chunk[:end])
            if end >= 0:
                return


def main(arguments: list[str]) -> int:
    """The command; returns the exit code of turbofit's contract."""
    if len(arguments) not in (2, 3):
        sys.stderr.write(
            "usage: python -m turbofit.rehearse.turbomind.probe SPEC.json OUT.json [FOLDER]\n"
        )
        return 2
    try:
        keep = Path(arguments[2]) if len(arguments) == 3 else None
        document = rehearse(load_spec(Path(arguments[0])), keep)
    except TurbofitError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    Path(arguments[1]).write_text(json.dumps(document, indent=1), encoding="utf-8")
    sys.stderr.write(f"pretend: {document['outcome']} in {document['seconds']} s\n")
    return 0 if document["outcome"] == "served" else 3


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
