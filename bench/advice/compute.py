"""One command line as a person would type it, run inside this process, and what it said."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from turbofit.cli.main import main
from turbofit.core.plan import Plan
from turbofit.core.presets import load_yaml
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, parse_bytes

__all__ = ["CASES", "Case", "Line", "Said", "computed", "progress", "run", "words"]

HERE = Path(__file__).parent
CASES = load_yaml(HERE / "cases.yaml")

#: What the first case found free when it sized its cache, MiB.
_FREE_AT_CACHE = 2780
_HELD = ("context", "weights")


class Said(Struct):
    """What turbofit said to one command line; ``plan`` is None where it was refused."""

    code: int
    plan: Plan | None
    error: str = ""

    @property
    def spare(self) -> int:
        """MiB that the tightest GPU keeps; negative where it lacks them."""
        assert self.plan is not None
        return min(one.headroom for one in self.plan.gpus) // MIB

    @property
    def serves(self) -> bool:
        """Whether no request within its limits kills it (less than the margin may be left)."""
        if self.plan is None:
            return False
        return self.plan.fits or ": serves" in self.plan.verdict

    @property
    def tokens(self) -> int:
        """KV tokens of all groups."""
        return 0 if self.plan is None else self.plan.kv.total_tokens


class Line(Struct):
    """One piece of advice; ``older`` is the same on the case's second version."""

    advice: str
    command: str
    said: Said
    older: Said | None
    note: str
    short: bool
    ours: bool
    unused: str = ""
    against: str = ""


class Case(Struct):
    """A case: what was there before the advice, the advice, our plan."""

    name: str
    title: str
    about: str
    version: str
    before: Line
    lines: tuple[Line, ...]


def run(command: str) -> Said:
    """What turbofit says to a command line."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        code = main([*shlex.split(command), "--json"])
    document = json.loads(out.getvalue())
    if "error" in document:
        return Said(code=code, plan=None, error=document["error"]["message"])
    return Said(code=code, plan=Plan.from_json(out.getvalue()))


def computed() -> Iterator[Case]:
    """Every case, each of its lines computed now."""
    for entry in CASES.values():
        version = entry.get("with", "")
        before = _line({"advice": entry["was"], "command": entry["before"]}, version, ours=False)
        rows = [_line(row, version, ours=False) for row in entry["rows"]]
        rows += [_line(row, "", ours=True) for row in entry["ours"]]
        yield Case(
            name=entry["name"],
            title=entry["title"],
            about=entry["about"],
            version=version,
            before=before,
            lines=tuple(rows),
        )


def _line(row: dict[str, str], version: str, *, ours: bool) -> Line:
    typed = _typed(row["command"])
    older = None
    if version:
        older = run(_typed(row["command"], version) + f" --lmdeploy {version}")
    return Line(
        advice=row["advice"],
        command=typed,
        said=run(typed),
        older=older,
        note=row.get("note", ""),
        short=bool(row.get("short")),
        ours=ours,
        unused=row.get("unused", ""),
        against=row.get("against", ""),
    )


def _typed(command: str, version: str = "") -> str:
    """The command with its figures: what an engine of that version would find on such cards."""
    if "{" not in command:
        return command
    said = run(
        "predict internvl2-8b --on 4xrtx3090 --tp 4" + (f" --lmdeploy {version}" if version else "")
    )
    assert said.plan is not None
    gpu = said.plan.gpus[0]
    held = sum(one.bytes for one in gpu.ledger if one.phase in _HELD)
    left = -(-held // MIB) + _FREE_AT_CACHE
    return command.format(left=left, used=(gpu.total - gpu.reserved) // MIB - left)


def words(said: Said) -> str:
    """The end of the story, short."""
    if said.plan is None:
        return f"refused: {said.error}"
    if said.serves:
        if said.plan.engine.name == "transformers":
            return "lives, " + _one_by_one(said.plan)
        spare = "" if said.plan.fits else f", {said.spare} MiB to spare"
        return f"lives, {said.tokens:,} tokens{spare}"
    verdict = said.plan.verdict
    short = _SHORT.search(verdict)
    return _ENDS[_stage(verdict)][1] + (f", {short[1]} short" if short else "")


def progress(said: Said) -> tuple[int, int]:
    """How far a start came that ended: the stage, and then how little was missing."""
    assert said.plan is not None
    short = _SHORT.search(said.plan.verdict)
    return _stage(said.plan.verdict), -parse_bytes(short[1]) if short else 0


_SHORT = re.compile(r"([\d.,]+ [KMG]?i?B) (?:short|more)")
#: How verdicts say it, and we, in the order of a start.
_ENDS = (
    ("while loading", "dies while loading"),
    ("no room for a cache", "no room for a cache"),
    ("right after the cache", "dies while starting"),
    ("never starts", "never starts"),
    ("warm-up", "dies in its warm-up or of the first image"),
    ("one image request at the limit", "dies of one image"),
    ("an image beside the longest prompts", "dies of an image beside long prompts"),
    ("image requests that meet", "dies of images that meet"),
    ("the longest prompts", "dies of a long prompt"),
    ("a full batch sampling", "dies of a full batch"),
)


def _stage(verdict: str) -> int:
    return next(at for at, (said, _) in enumerate(_ENDS) if said in verdict)


def _one_by_one(plan: Plan) -> str:
    """What a plan for Transformers serves, and what it says of layers that are on no GPU."""
    copies = plan.parallel.replicas
    said = f"{copies} copies, each " if copies > 1 else ""
    said += f"one request of {plan.settings.session_len:,} tokens at a time"
    for text in plan.warnings:
        found = re.search(r"(\d+) of (\d+) decoder layers.*?([\d.]+ s a token)", text)
        if found:
            return f"{said}, {found[1]} of {found[2]} layers on no GPU: at best {found[3]}"
    return said
