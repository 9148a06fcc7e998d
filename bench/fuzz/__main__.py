"""Fuzzing with coverage (atheris) of everything that reads what others wrote.

    python -m bench.fuzz [TARGET ...] --minutes M   # targets in turn, each an equal share
    python -m bench.fuzz --list                     # targets, and what is kept of each
    python -m bench.fuzz --replay                   # what is kept, without atheris
    python -m bench.fuzz --keep                     # minimise what was found, to `corpus/`
    python -m bench.fuzz --write                    # time and calls to RESULTS.md

It may be killed at any time: corpus, findings and counts are in ``--folder``, and the next run goes
on there. Exits with 1 where an input ends otherwise than its target's docstring promises, or takes
over a second of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.fuzz import corpus, results
from bench.fuzz.check import check
from bench.fuzz.minimise import minimised
from bench.fuzz.targets import TARGETS, load

REPO = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--slice", type=float, default=120.0, help="seconds of a target's turn")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "turbofit-fuzz",
        help="corpus, findings and counts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--input", type=Path, help="give this file to the one TARGET, no more")
    parser.add_argument("--note", default="", help="keep that input, with what it broke")
    for name, text in (
        ("list", "targets"), ("replay", "what is kept"), ("keep", "minimise what was found"),
        ("write", "write RESULTS.md"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args = parser.parse_args()
    unknown = sorted(set(args.targets) - set(TARGETS))
    if unknown:
        parser.error(f"no target is called {unknown[0]}: {', '.join(TARGETS)}")
    names = args.targets or list(TARGETS)
    if args.input:
        return _one(names[0], args.input.read_bytes(), args.note)
    if args.list:
        for name in names:
            print(
                f"{name}: {len(corpus.inputs(name))} inputs; {load(name).__doc__.splitlines()[0]}"
            )
        return 0
    if args.replay:
        return _replay(names)
    if args.keep:
        return _keep(names, args.folder)
    if args.write:
        results.write(args.folder)
        return 0
    return _fuzz(names, args)


def _fuzz(names: list[str], args: argparse.Namespace) -> int:
    """Targets in turn until the time is over, or a signal ends it; then what was found."""
    for name in names:
        for room in ("corpus", "found"):
            (args.folder / room / name).mkdir(parents=True, exist_ok=True)
        (args.folder / "tally").mkdir(exist_ok=True)
        seeds = [*load(name).seeds(), *(one.data for one in corpus.inputs(name))]
        corpus.unpack(seeds, args.folder / "corpus" / name)
    ends = time.monotonic() + args.minutes * 60
    share = min(args.slice, args.minutes * 60 / len(names))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for name in itertools.cycle(names):
            seconds = min(share, ends - time.monotonic())
            if seconds < 1:
                break
            print(f"{time.strftime('%H:%M:%S')} {name} for {seconds:.0f} s", flush=True)
            code = _turn(name, args.folder, seconds)
            if code:
                print(f"{name} ended with {code}, see {args.folder / name}.log", flush=True)
    return _findings(names, args.folder)


def _turn(name: str, folder: Path, seconds: float) -> int:
    words = [sys.executable, "-m", "bench.fuzz.child", name, str(folder), f"{seconds:.0f}"]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.run(words, cwd=REPO, stderr=log, check=False).returncode


def _findings(names: list[str], folder: Path) -> int:
    """What was found and still happens, without instrumentation and in a process of its own."""
    bad = 0
    for name in names:
        for path in sorted((folder / "found" / name).glob("*")):
            if path.suffix == ".txt":
                continue
            words = [sys.executable, "-m", "bench.fuzz", name, "--input", str(path)]
            done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=False)
            if not done.returncode:
                path.unlink()
                path.with_name(f"{path.name}.txt").unlink(missing_ok=True)
                continue
            bad += 1
            print(f"{name}: {path} ({path.stat().st_size} bytes)")
    print(f"{bad} findings")
    return int(bool(bad))


def _one(name: str, data: bytes, note: str) -> int:
    finding = check(load(name).one, data)
    print(finding.text if finding else "it ends as it may")
    if note:
        kept = [one for one in corpus.inputs(name) if one.data != data]
        corpus.write(corpus.FOLDER / f"{name}.txt", [*kept, corpus.Kept(data, note)])
    return int(finding is not None)


def _replay(names: list[str]) -> int:
    bad = 0
    for name in names:
        target = load(name)
        for one in [*map(corpus.Kept, target.seeds()), *corpus.inputs(name)]:
            finding = check(target.one, one.data)
            if finding is not None:
                bad += 1
                print(f"{name}: {finding.name} {one.note}\n{finding.text}")
    print(f"{bad} findings")
    return int(bool(bad))


def _keep(names: list[str], folder: Path) -> int:
    for name in names:
        target, before = load(name), corpus.inputs(name)
        known = [one for one in before if one.note]
        files = sorted((folder / "corpus" / name).glob("*"))
        data = {path.read_bytes() for path in files} | {one.data for one in before}
        kept = minimised(target.one, [*target.seeds(), *(one.data for one in known)], data)
        corpus.write(corpus.FOLDER / f"{name}.txt", [*known, *map(corpus.Kept, kept)])
        print(f"{name}: {len(kept)} of {len(data)} inputs, {sum(map(len, kept))} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
