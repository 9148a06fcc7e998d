"""Writes the censuses of releases: presets, and the page of results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.page import ran_on, table
from turbofit.core.presets import presets_dir
from turbofit.kernels.census import Census, Count

HERE = Path(__file__).parent

_HEAD = """\
# The kernels of TurboMind in the wheel of LMDeploy {version}, as `python -m
# bench.census.wheels --write` read them. A cell is how many kernels of a family hold code for an
# architecture, and after a + how many are empty: their host part launches them, and nothing is
# computed. `libraries`: SHA-256 of the library in the wheels for Python 3.10 to 3.13.
"""


@dataclass(frozen=True)
class Release:
    """One release, and how many seconds its census took."""

    version: str
    census: Census
    hashes: tuple[str, ...]
    seconds: float

    @property
    def numbers(self) -> str:
        """The version without what follows its three numbers."""
        return ".".join(re.findall(r"\d+", self.version)[:3])


def write(releases: Sequence[Release], *, keep: bool) -> str:
    """The page of results; with ``keep`` the page and the presets are written."""
    runs = list(_runs(releases))
    page = _page(runs)
    if keep:
        folder = presets_dir() / "engines" / "kernels"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("turbomind-*.yaml"):
            old.unlink()
        for run in runs:
            path = folder / f"turbomind-{run[0].numbers}.yaml"
            path.write_text("\n".join(_preset(run)) + "\n")
        (HERE / "RESULTS.md").write_text(page)
    return page


def _runs(releases: Iterable[Release]) -> Iterable[list[Release]]:
    """Releases one after the other whose kernels are the same."""
    run: list[Release] = []
    for release in releases:
        if run and release.census.families != run[-1].census.families:
            yield run
            run = []
        run.append(release)
    if run:
        yield run


def _preset(run: Sequence[Release]) -> Iterable[str]:
    first = run[0]
    yield _HEAD.format(version=", ".join(release.version for release in run)).rstrip("\n")
    yield f"library: {first.census.library}"
    yield f'architectures: "{" ".join(first.census.architectures)}"'
    yield f'ptx: "{" ".join(first.census.ptx)}"'
    yield "families:"
    for name, counts in first.census.families.items():
        cells = (_cell(counts.get(one, Count())) for one in first.census.architectures)
        yield f'  {name}: "{" ".join(cells)}"'
    hashed = [release for release in run if release.hashes]
    if hashed:
        yield "libraries:"
    for release in hashed:
        yield f"  {release.numbers}:"
        yield from (f"    - {digest}" for digest in release.hashes)


def _cell(count: Count) -> str:
    return f"{count.code}+{count.empty}" if count.empty else str(count.code)


def _page(runs: Sequence[Sequence[Release]]) -> str:
    slowest = max(release.seconds for run in runs for release in run)
    ptx = (
        "A driver compiles PTX for architectures that are not named."
        if any(run[0].census.ptx for run in runs)
        else "An architecture that is not named has no code. No release has PTX, which a driver"
        " could compile for another one."
    )
    rows = []
    for run in runs:
        names = run[0].version if len(run) == 1 else f"{run[0].version} to {run[-1].version}"
        census = run[0].census
        rows.append((names, ", ".join(census.architectures), "; ".join(_lacking(census))))
    return f"""\
# The kernels in LMDeploy's wheels

`python -m bench.census.wheels --write`, {ran_on()}. Read from TurboMind's library in each wheel;
slowest {slowest:.1f} s. Nothing of it was run.

{ptx}

{table("release | architectures | no code, empty or absent, for", rows)}
"""


def _lacking(census: Census) -> Iterable[str]:
    """The families that multiply weights, and the architectures that have none of them."""
    for name in sorted(census.families):
        if not name.startswith(("gemm", "experts")):
            continue
        serving = [name, name.replace("gemm", "experts")]
        lacking = [
            f"{one} (empty)" if census.count(serving, one).empty else one
            for one in census.architectures
            if not census.count(serving, one).code
        ]
        if lacking:
            yield f"{name}: {', '.join(lacking)}"
