"""Every allocation fails once: how each ends, and what turbofit says of it.

    python -m bench.faults.allocations [--only WORDS] [--seed N] [--lives N] [--results FILE]

For each configuration one whole life of the engine is rehearsed on pretend GPUs: start, warm-up,
the worst request. Then it lives again, and again, each time with one allocation that fails as if
the card (or the host) had no room. The bar: each life ends, and turbofit names phase and cause, or
the engine goes on; none hangs, and nobody is blamed who is not there.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.faults.allocation_configs import CONFIGS, Config, Ended, Point
from bench.faults.allocation_lives import TurboMindLives
from bench.faults.torch_lives import TorchLives

KINDS = ("named", "recovered", "answered", "misnamed", "hang", "not met")
#: A fifth of the lives is for page-locked memory, where the engine takes any.
_PINNED_SHARE = 5


@dataclass
class Swept:
    """One configuration: how many allocations a whole life has, and how each tried one ended."""

    config: Config
    device: int
    pinned: int
    ended: list[Ended]
    seconds: float

    def count(self, kind: str) -> int:
        """How many ended so."""
        return sum(one.kind == kind for one in self.ended)


def sample(points: Sequence[Point], most: int, draw: random.Random) -> list[Point]:
    """Of each kind of memory the first and last of every phase; then drawn: places, then any.

    Places are an engine's calls: the first allocation of each call in each phase is one of them.
    """
    if len(points) <= most:
        return list(points)
    chosen: dict[int, Point] = {}
    for phase in dict.fromkeys(point.phase for point in points):
        inside = [point for point in points if point.phase == phase]
        for point in (inside[0], inside[-1]):
            chosen[point.number] = point
    kept = sorted(chosen.values(), key=lambda point: point.number)
    if len(kept) > most:
        return sorted(draw.sample(kept, most), key=lambda point: point.number)
    first = {(point.phase, point.site): point for point in reversed(points)}
    places = [point for point in first.values() if point.number not in chosen]
    draw.shuffle(places)
    for point in places[: (most - len(chosen)) * 2 // 3]:
        chosen[point.number] = point
    rest = [point for point in points if point.number not in chosen]
    for point in draw.sample(rest, most - len(chosen)):
        chosen[point.number] = point
    return sorted(chosen.values(), key=lambda point: point.number)


def sweep(config: Config, checkpoints: Path, seed: int) -> Swept:
    """All lives of one configuration."""
    begun = time.monotonic()
    draw = random.Random(f"{seed} {config.name}")
    kind: Any = TurboMindLives if config.engine == "turbomind" else TorchLives
    ended = []
    with kind(config, checkpoints) as lives:
        points = lives.whole()
        pinned = [point for point in points if point.pinned]
        device = [point for point in points if not point.pinned]
        some = sample(pinned, min(len(pinned), config.lives // _PINNED_SHARE), draw)
        for point in sample(device, config.lives - len(some), draw) + some:
            one = lives.fail(point.number, pinned=point.pinned)
            ended.append(one)
            told = one.point or point
            what = "page-locked" if told.pinned else "device"
            mark = "" if one.kind in ("named", "recovered", "answered") else "!! "
            print(
                f"{mark}{config.name}: {what} {told.number} of {told.phase} ({told.site}): "
                f"{one.kind} {one.why} [{one.seconds:.1f} s]",
                flush=True,
            )
    return Swept(config, len(device), len(pinned), ended, time.monotonic() - begun)


def table(rows: Sequence[Swept], seed: int) -> str:
    """What goes into the file of results."""
    tried = sum(len(row.ended) for row in rows)
    hangs, wrong = (sum(row.count(kind) for row in rows) for kind in ("hang", "misnamed"))
    lines = [
        "# Every allocation fails once",
        "",
        f"`python -m bench.faults.allocations --seed {seed}`, {time.strftime('%Y-%m-%d')}, "
        f"{platform.system()}, Python {platform.python_version()}: {tried} lives of real engines on"
        f" pretend GPUs in {sum(row.seconds for row in rows) / 60:.0f} minutes on 2 shared cores,"
        f" each with one allocation that fails. **{hangs} hung, {wrong} were misnamed.**",
        "",
        "*named*: the engine died, and `turbofit diagnose` names phase and cause from its log."
        " *recovered*: the request was answered all the same, or had been: TurboMind computes a"
        " step ahead. *answered*: the request failed and"
        " the engine lives. Numbers are drawn: the first and the last allocation of each phase,"
        " then two thirds first allocations of the engine's calls, one third any (seeded). They"
        " are counted over all ranks and processes. Torch's allocator empties its cache and asks"
        " again after a failure: there the next allocation fails, too, but for the first number.",
        "",
        "| configuration | device allocations | page-locked | tried | "
        + " | ".join(KINDS)
        + " | longest | all |",
        "|---|" + "---|" * (len(KINDS) + 5),
    ]
    for row in rows:
        counts = " | ".join(str(row.count(kind)) for kind in KINDS)
        longest = max((one.seconds for one in row.ended), default=0.0)
        lines.append(
            f"| {row.config.name}: {row.config.model} | {row.device} | {row.pinned}"
            f" | {len(row.ended)} | {counts} | {longest:.0f} s | {row.seconds:.0f} s |"
        )
    bad = [(row, one) for row in rows for one in row.ended if one.kind in ("hang", "misnamed")]
    lines += ["", "## Not as they should be", ""] if bad else []
    for row, one in bad:
        assert one.point is not None
        what = "page-locked" if one.point.pinned else "device"
        lines.append(
            f"- {row.config.name}, {what} allocation {one.point.number} ({one.point.phase}, "
            f"{one.point.site}): {one.kind}; {one.why or one.said}"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.allocations", description=__doc__)
    parser.add_argument("--only", default="", help="configurations whose name has this")
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--lives", type=int, help="so many each, in place of each one's number")
    parser.add_argument("--results", type=Path, help="write the table into this file")
    parser.add_argument("--logs", type=Path, help="keep logs of bad ends in this folder")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="turbofit-checkpoints-") as folder:
        for config in CONFIGS:
            if args.only not in config.name:
                continue
            config = replace(config, lives=args.lives or config.lives)  # noqa: PLW2901
            rows.append(sweep(config, Path(folder), args.seed))
            if args.results:  # as far as it has come: a sweep takes half an hour
                args.results.write_text(table(rows, args.seed), encoding="utf-8")
            for number, one in enumerate(rows[-1].ended if args.logs else ()):
                if one.kind in ("misnamed", "hang", "not met"):
                    args.logs.mkdir(parents=True, exist_ok=True)
                    name = f"{CONFIGS.index(next(c for c in CONFIGS if c.name == config.name))}"
                    (args.logs / f"{name}-{number}.log").write_bytes(one.log)
    print(table(rows, args.seed))
    return 1 if any(row.count("hang") + row.count("misnamed") for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
