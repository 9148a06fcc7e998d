"""The advice that people were given: each row of bench/advice says what its command says now."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from turbofit.cli.main import main
from turbofit.core.plan import Plan
from turbofit.core.units import MIB

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "bench" / "advice" / "RESULTS.md").read_text()
#: What was advised, what that does, how it is judged, and the command that computes it.
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) \| `(p.+?)` \|$", PAGE, re.MULTILINE)
#: How the page says an end, and how a verdict says it.
ENDS = {
    "dies while loading": "while loading",
    "never starts": "never starts",
    "dies in its warm-up or of the first image": "warm-up",
    "dies of one image": "one image request at the limit",
    "dies of an image beside long prompts": "an image beside the longest prompts",
    "dies of images that meet": "image requests that meet",
    "dies of a full batch": "a full batch sampling",
}


def tokens(does: str) -> int:
    found = re.match(r"lives, ([\d,]+) tokens", does)
    return int(found[1].replace(",", "")) if found else 0


def check(command: str, does: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the command's answer is a plan that serves; its figures are those of the page."""
    main([*shlex.split(command), "--json"])
    document = json.loads(capsys.readouterr().out)
    if does.startswith("refused: "):
        assert does == f"refused: {document['error']['message']}"
        return False
    plan = Plan.from_json(json.dumps(document))
    serves = plan.fits or ": serves" in plan.verdict
    assert serves == does.startswith("lives"), plan.verdict
    if not serves:
        end, _, short = does.removesuffix(" short").partition(", ")
        assert ENDS[end] in plan.verdict
        assert re.search(rf"{re.escape(short)} (short|more)", plan.verdict)
    elif "one request" in does:
        assert f"one request of {plan.settings.session_len:,} tokens at a time" in does
        layers = re.search(r"(\d+ of \d+) layers on no GPU: at best ([\d.]+ s a token)", does)
        assert layers is None or all(one in " ".join(plan.warnings) for one in layers.groups())
    else:
        assert f"lives, {plan.kv.total_tokens:,} tokens" in does
        spare = min(gpu.headroom for gpu in plan.gpus) // MIB
        assert plan.fits or f", {spare} MiB to spare" in does
    return serves


@pytest.mark.parametrize(
    ("advice", "does", "judged", "command"), ROWS, ids=[row[3] for row in ROWS]
)
def test_a_row_is_what_its_command_says(advice, does, judged, command, capsys) -> None:
    serves = check(command, does, capsys)
    assert not judged.startswith("helps") or serves
    assert not re.match("no help|not enough|worse|cannot be", judged) or not serves
    better = re.match(r"([\d.]+) times the tokens of \"(.+?)\"", judged)
    if better is not None:
        others = [tokens(row[1]) for row in ROWS if row[0] == better[2]]
        assert better[1] in [f"{tokens(does) / other:.2g}" for other in others if other]
    alike = re.search(r"about as many tokens as \"(.+?)\"", judged)
    if alike is not None:
        others = [tokens(row[1]) for row in ROWS if row[0] == alike[1] and tokens(row[1])]
        assert any(abs(tokens(does) - other) <= 0.02 * other for other in others)
    older = re.search(r"on ([\d.]+): ([^;]+)", judged)
    # What others hold is another figure there: of what that version itself takes.
    if older is not None and not re.search(":(free|used)=", command):
        check(f"{command} --lmdeploy {older[1]}", older[2], capsys)


def test_the_page_of_cases_quotes_the_rows() -> None:
    cases = (ROOT / "docs" / "cases.md").read_text()
    table = cases[cases.index("| case | advice |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    assert all(row in PAGE for row in table)
    assert len(ROWS) >= 40
