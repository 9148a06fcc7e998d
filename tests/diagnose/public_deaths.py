"""Does ``turbofit diagnose`` name phase and cause of deaths that people posted?

``public_deaths.yaml`` has the facts of the threads, and the answer that each thread came to; no
log was diagnosed before that was written down. Each becomes a log (`public_logs.py`).

    python -m tests.diagnose.public_deaths      # renews bench/faults/PUBLIC_DEATHS.md
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.diagnose.conftest import message, tried
from tests.diagnose.public_logs import CASES, log_of
from turbofit.core.struct import Struct
from turbofit.diagnose.answer import Diagnosis
from turbofit.diagnose.explain import diagnose

RESULTS = Path(__file__).parents[2] / "bench" / "faults" / "PUBLIC_DEATHS.md"
#: What of an answer shows that a reason was found.
_REASONS = {
    "eager": "whole matrix",
    "twice": "loaded the whole model",
    "outside torch": "outside torch",
}
#: An order to end a process that the log may have from the server itself.
_ORDER = re.compile(r"^(?:end|stop|kill|close)\b(?!.*\bif\b)", re.IGNORECASE)


class Judged(Struct):
    """One death: what was expected, what was said, and what of it was wrong.

    ``listed``: its cause is not proven, and stands in what others had.
    """

    name: str
    at: str
    model: str
    expected: dict[str, str]
    kind: str
    phase: str
    wrong: tuple[str, ...]
    listed: bool
    order: str = ""


def judge(name: str, case: dict[str, Any]) -> Judged:
    """Diagnose a case and compare."""
    found, expected = diagnose([log_of(case).encode()]), case["expect"]
    wrong = [] if message(found) == expected["kind"] else ["kind"]
    if found.phase not in (expected["phase"], "unknown"):
        wrong.append("phase")
    if "held" in expected and holder(found) != expected["held"]:
        wrong.append("held")
    if "why" in expected and _REASONS[expected["why"]] not in " ".join((found.what, *found.why)):
        wrong.append("why")
    return Judged(
        name=name,
        at=case["at"],
        model=case["model"],
        expected=expected,
        kind=message(found),
        phase=found.phase,
        wrong=tuple(wrong),
        listed=not found.known,
        order=next((one for one in tried(found) if _ORDER.match(one)), ""),
    )


def in_short(one: Judged) -> str:
    """The answer in short."""
    return f"unknown; others had {one.kind}" if one.listed else f"{one.kind}, {one.phase}"


def holder(found: Diagnosis) -> str:
    """Who is said to have held the card."""
    who = " ".join(one.who for one in found.held)
    if re.search(r"(?<!\()\bprocess \d", who):
        return "others"
    if any("explained by nobody" in one for one in found.why):
        return "nobody"
    return "this process" if "this process" in who else "not said"


def report(cases: Sequence[Judged]) -> str:
    """The page of results."""
    right = [one for one in cases if not one.wrong]
    orders = [one for one in cases if one.order]
    listed = sum(one.listed for one in cases)
    dark = [one for one in cases if not one.listed and one.phase != one.expected["phase"]]
    lines = [
        "# Deaths that people posted",
        "",
        *textwrap.wrap(
            f"`python -m tests.diagnose.public_deaths`: {len(cases)} public threads; their facts"
            " are in [public_deaths.yaml](../../tests/diagnose/public_deaths.yaml), with the answer"
            " that each"
            " thread came to. Nothing that is said is wrong (the cause, its phase and, where the"
            f" thread shows them, who held the memory and why) in **{len(right)} of {len(cases)}**."
            f" {len(cases) - listed} have a cause that the log proves, {len(dark)} of them without"
            f" the phase, which it does not; {listed} are unknown, with what others had who met the"
            " same message. An order to end a process without a condition stands in"
            f" **{len(orders)}**.",
            width=100,
        ),
        "",
        "*unknown* as an expected phase: neither the log nor the thread says where it died.",
        "",
        "| thread | model | expected | said | wrong |",
        "|---|---|---|---|---|",
    ]
    for one in cases:
        expected = ", ".join(one.expected.values())
        lines.append(
            f"| [{one.name}]({one.at}) | {one.model} | {expected} | {in_short(one)} |"
            f" {', '.join(one.wrong)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    RESULTS.write_text(report([judge(name, case) for name, case in CASES.items()]))
