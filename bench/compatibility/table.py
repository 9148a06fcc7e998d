"""Folds what pairs said into `presets/engines/compatibility.yaml`, beside what it has."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from itertools import chain, product
from typing import Any, Final, NamedTuple

import yaml

from turbofit.memory.versions import parse
from turbofit.planning.compatibility import FrontEnd, compatibility
from turbofit.planning.examine.packages import satisfies

#: The job with the code that InternVL's checkpoints publish stands for the family.
PUBLISHED: Final = "InternVLChatModel+published"
_HEAD: Final = """\
# With which versions of Transformers LMDeploy's front ends fail, family by family; what is not here
# ran. Made by `python -m bench.compatibility`, which says how; do not edit it by hand.
# first, last: tried versions, both included. step: import, config, start (of the front end), image
# (one image preprocessed: as many tokens and pixels as turbofit's rule says), class (the model's,
# built without memory). outside: tried, and excluded by LMDeploy's own metadata. A name after + is
# that of other code beside the checkpoint. Nothing was computed: right answers are not promised.
"""


class Outcome(NamedTuple):
    """What one pair did with one family on one engine; ``step`` is empty where it ran."""

    lmdeploy: str
    transformers: str
    engine: str
    architecture: str
    step: str = ""
    error: str = ""


def listed() -> list[Outcome]:
    """What the table has, as if each of its pairs had been tried now."""
    table, found = compatibility(), []
    for engine, architectures in table.families.items():
        failing = (one.architectures for one in table.failures if one.engine == engine)
        names = sorted({*architectures, *chain.from_iterable(failing)})
        for lmdeploy, architecture in product(table.transformers, names):
            front_end = FrontEnd(lmdeploy, architecture, engine)
            for version in table.transformers[lmdeploy]:
                failed = front_end.failure(version)
                words = (failed.step, failed.error) if failed else ("", "")
                found.append(Outcome(lmdeploy, version, engine, architecture, *words))
    return found


def fold(lmdeploy: str, transformers: str, answer: dict[str, Any]) -> list[Outcome]:
    """One outcome for each family and engine of a pair."""
    short, found = lmdeploy.rpartition(".")[0], []
    for name, told in answer["families"].items():
        architecture = "InternVLChatModel" if name == PUBLISHED else name
        for engine in {"turbomind", "pytorch"} & told.keys():
            failed = told[engine] or {"step": "", "error": ""}
            found.append(
                Outcome(short, transformers, engine, architecture, failed["step"], failed["error"])
            )
    return found


def render(outcomes: list[Outcome], *, source: str, allowed: str = "") -> str:
    """The YAML file; ``allowed`` are the bounds that LMDeploy's metadata set.

    Of outcomes of one pair, family and engine the last counts.
    """
    outcomes = list({one[:4]: one for one in outcomes}.values())
    tried = sorted({one.transformers for one in outcomes}, key=_key)
    lmdeploys = sorted({one.lmdeploy for one in outcomes}, key=_key)
    by_lmdeploy = {
        lmdeploy: sorted({o.transformers for o in outcomes if o.lmdeploy == lmdeploy}, key=_key)
        for lmdeploy in lmdeploys
    }
    engines = ("turbomind", "pytorch")
    families = {
        engine: sorted({
            one.architecture for one in outcomes
            if one.engine == engine and "+" not in one.architecture  # no code of a variant's own
        })
        for engine in engines
    }  # fmt: skip
    values = {
        "schema": "turbofit.compatibility/1", "source": source,
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "transformers": by_lmdeploy,
        "outside": [one for one in tried if not satisfies(one, allowed)], "families": families,
    }  # fmt: skip
    text = yaml.safe_dump(values, sort_keys=False, width=110, default_flow_style=None)
    rows = [_line(row) for row in _failures(outcomes)]
    return "".join([_HEAD, text, "failures:\n", *rows])


def _line(row: dict[str, Any]) -> str:
    text = yaml.safe_dump(row, sort_keys=False, width=110, default_flow_style=True)
    return "- " + text.replace("\n", "\n  ").rstrip() + "\n"


def _failures(outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    """Neighbouring versions that fail alike are one row, and so are families and LMDeploys."""
    rows: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    by_family: dict[tuple[str, str, str], dict[str, Outcome]] = {}
    for one in outcomes:
        by_family.setdefault((one.lmdeploy, one.engine, one.architecture), {})[one.transformers] = (
            one
        )
    for (lmdeploy, engine, architecture), found in by_family.items():
        for first, last, step, error in _runs(found):
            key = (engine, first, last, step, error)
            rows.setdefault(key, []).append((lmdeploy, architecture))
    for (engine, first, last, step, error), whom in sorted(rows.items(), key=_order):
        by_releases: dict[tuple[str, ...], list[str]] = {}
        for architecture in sorted({a for _, a in whom}):
            releases = tuple(sorted({v for v, a in whom if a == architecture}, key=_key))
            by_releases.setdefault(releases, []).append(architecture)
        for releases, architectures in by_releases.items():
            yield {
                "lmdeploy": list(releases), "engine": engine, "architectures": architectures,
                "first": first, "last": last, "step": step, "error": error,
            }  # fmt: skip


def _runs(found: dict[str, Outcome]) -> Iterator[tuple[str, str, str, str]]:
    """First and last of tried versions, one after the other, that fail at one step alike."""
    first: Outcome | None = None
    last: Outcome | None = None
    for version in [*sorted(found, key=_key), ""]:
        now = found.get(version)
        failed = now if now is not None and now.step else None
        if first and last and (failed is None or _cause(failed) != _cause(first)):
            yield first.transformers, last.transformers, first.step, first.error
            first = None
        first, last = first or failed, failed


def _cause(one: Outcome) -> tuple[str, str]:
    return one.step, one.error


def _order(item: tuple[tuple[str, ...], Any]) -> tuple[Any, ...]:
    engine, first, last, step, error = item[0]
    return _key(first), _key(last), engine, step, error


def _key(version: str) -> tuple[int, int, int]:
    return parse(version) or (0, 0, 0)
