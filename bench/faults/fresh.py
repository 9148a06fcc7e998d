"""Is ``turbofit diagnose`` right about public reports that it has never seen? Somebody else judges.

Who gathers the reports writes the queries first, then each report with what its thread came to
(``truth``), and sees no answer. The judge sees report, truth and answer, and not the code. A
collection is a YAML list of {at, query, log, truth}, with ``foreign: true`` for another program's.

    python -m bench.faults.fresh sheet reports.yaml sheet.yaml    # adds each answer; verdicts open
    python -m bench.faults.fresh count sheet.yaml                 # after they are filled in
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from turbofit.core.struct import to_builtins
from turbofit.diagnose.explain import diagnose

#: Right: the thread's cause, or first in the list of what others had. Wrong: the thread contradicts
#: it. Silent: unknown, and nothing untrue. Of a foreign log: named, and neither explained.
VERDICTS: Final = ("right", "wrong", "silent")
#: Shares of the reports of LMDeploy.
LEAST_RIGHT, MOST_WRONG = 0.75, 0.05
#: The parts of an answer that a judge reads.
_SHOWN: Final = (
    "kind",
    "phase",
    "what",
    "why",
    "missing",
    "changes",
    "others",
    "would_work",
    "send",
)


def sheet(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports with their answers, and a verdict to be filled in.

    Raises:
        ValueError: a report lacks its place, query, log or truth, or stands there twice.
    """
    places = Counter(report.get("at") for report in reports)
    for report in reports:
        if not all(report.get(name) for name in ("at", "query", "log", "truth")):
            raise ValueError(f"{report.get('at')}: at, query, log and truth are needed")
        if places[report["at"]] > 1:
            raise ValueError(f"{report['at']}: it stands there twice")
    return [
        {**report, "answer": answer_of(report["log"]), "verdict": "", "because": ""}
        for report in reports
    ]


def answer_of(log: str) -> dict[str, Any]:
    """What a judge reads of the answer to a log."""
    document = to_builtins(diagnose([log.encode()]))
    return {name: document[name] for name in _SHOWN if document.get(name)}


def count(judged: list[dict[str, Any]]) -> tuple[str, bool]:
    """The row of a results page, and whether the bars are met.

    Raises:
        ValueError: a verdict is missing, or none of the three.
    """
    for report in judged:
        if report.get("verdict") not in VERDICTS:
            raise ValueError(f"{report['at']}: the verdict is one of {', '.join(VERDICTS)}")
    of_lmdeploy = Counter(one["verdict"] for one in judged if not one.get("foreign"))
    foreign = Counter(one["verdict"] for one in judged if one.get("foreign"))
    number = of_lmdeploy.total() or 1
    shares = [f"{of_lmdeploy[name]} ({of_lmdeploy[name] / number:.0%})" for name in VERDICTS]
    row = f"| {of_lmdeploy.total()} | {' | '.join(shares)} |"
    if foreign:
        row += f" {foreign['right']} of {foreign.total()} foreign logs named and not explained |"
    met = (
        of_lmdeploy["right"] >= LEAST_RIGHT * number
        and of_lmdeploy["wrong"] <= MOST_WRONG * number
        and foreign["right"] == foreign.total()
    )
    return row, met


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults.fresh", description=__doc__)
    parser.add_argument("task", choices=("sheet", "count"))
    parser.add_argument("reports", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="where a sheet is written; stdout else")
    options = parser.parse_args(argv)
    reports: Any = yaml.safe_load(options.reports.read_text(encoding="utf-8"))
    if options.task == "count":
        row, met = count(reports)
        print(row)
        return 0 if met else 1
    text = yaml.safe_dump(sheet(reports), allow_unicode=True, sort_keys=False, width=100)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
