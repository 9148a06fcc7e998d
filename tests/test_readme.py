"""The README says what the commands in it say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from scripts import record
from turbofit.cli.command_group import COMMANDS
from turbofit.cli.main import main
from turbofit.core.plan import Plan

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
CASES_PAGE = (ROOT / "docs" / "cases.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()
ACCURACY_PAGE = (ROOT / "docs" / "accuracy.md").read_text()
ENGINES = {"TurboMind": "turbomind", "PyTorch engine": "pytorch", "Transformers": "transformers"}

#: What a plan's verdict says of capacity and of what is left.
FIGURES = re.compile(r"[\d,]+ KV tokens|[\d,]+ tokens at a time|[\d.,]+ [KMG]iB stay free")
#: A recipe's command without ``turbofit``, and what its row says of the plan.
RECIPE = re.compile(r"^\| [^|]+ \| [^|]*`(plan [^`|]*--on [^`|]*)`[^|]*\| ([^|]+) \|", re.MULTILINE)


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with this head."""
    table = text[text.index(head) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


CASES = RECIPE.findall(CASES_PAGE)


def plan_of(command: str, capsys: pytest.CaptureFixture[str]) -> Plan:
    assert main([*shlex.split(command), "--json"]) == 0
    return Plan.from_json(capsys.readouterr().out)


@pytest.mark.parametrize(("command", "answer"), CASES, ids=[command for command, _ in CASES])
def test_a_recipe_gives_what_its_row_says(command: str, answer: str, capsys) -> None:
    plan = plan_of(command, capsys)
    figures = FIGURES.findall(answer)
    assert figures
    for figure in figures:
        assert figure in f"{plan.verdict}; {plan.kv.total_tokens:,} KV tokens"
    named = [name for name in ENGINES if answer.startswith(name)]
    assert all(plan.engine.name == ENGINES[name] for name in named)
    dtypes = re.findall(r"\bb?float16\b", answer)
    assert not dtypes or plan.settings.dtype == dtypes[0]
    shape = re.search(r"(two|four) (?:copies|engines)(?:.*? of tp (\d))?", answer)
    if shape is not None:
        assert plan.parallel.replicas == {"two": 2, "four": 4}[shape[1]]
        assert plan.parallel.tp == int(shape[2] or 1)


def test_the_picture_at_the_top_is_what_the_command_says() -> None:
    assert record.COMMAND in TEXT
    assert record.SHOWN.read_text() == record.drawn(), "run python scripts/record.py"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_it_is_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= 120


def test_every_command_is_there() -> None:
    assert "    ./scripts/check\n" in TEXT
    table = COMMANDS_PAGE.split("\n\n`MODEL`")[0]
    for name in COMMANDS:
        assert re.search(rf"`(turbofit )?{name}[ `]", table), name


def test_accuracy_is_quoted_as_it_was_reached() -> None:
    results = (ROOT / "bench" / "accuracy" / "RESULTS.md").read_text()
    bars = {cells[0]: cells[1] for cells in rows(results, "| bar | reached |")}
    median = bars["InternVL2 table, TurboMind: median error 1 % of the card"].split(" of ")[0]
    worst = bars["InternVL2 table, TurboMind: worst 3 %"]
    said = " ".join(ACCURACY_PAGE.split())
    assert f"a median error of {median} of the card, worst {worst}" in said
    assert f"a median error of {median} of the card" in " ".join(TEXT.split())
    assert f"counts within {bars['KV block count within 2 %']}" in said
    missed = bars["no row that ran is forecast to run out"].split(", ")
    assert len(missed) == 1
    missed += bars["no row that ran out is forecast to keep more than the margin"].split(", ")
    assert all(f"`{name}`" in said for name in missed)


def test_what_the_gateway_costs_is_quoted_as_it_was_measured() -> None:
    results = (ROOT / "bench" / "gateway" / "RESULTS.md").read_text()
    text, image = (float(cells[3].split()[0]) for cells in rows(results, "| request | direct")[:2])
    said = " ".join(TEXT.split())
    assert (
        f"adds {text:.1f} ms to a request of text and {image:.1f} ms to one with an image" in said
    )


def test_what_queued_images_gain_is_what_the_plans_say(capsys) -> None:
    queued, not_queued = (
        f"{plan_of(f'plan qwen2-vl-7b --on 1xrtx3090 {one}', capsys).kv.total_tokens:,}"
        for one in ("--queue-images", "--no-queue-images")
    )
    said = " ".join(COMMANDS_PAGE.split())
    assert f"Qwen2-VL-7B on a 3090: {queued} KV tokens instead of {not_queued};" in said


def test_the_error_of_the_forecast_of_speed_is_quoted_as_it_was_reached() -> None:
    results = (ROOT / "bench" / "speed" / "RESULTS.md").read_text()
    (median,) = re.findall(r"^\| median error at most 25% \| ([\d.]+)% \|", results, re.MULTILINE)
    pages = ("README.md", "docs/accuracy.md")
    for page in pages:
        said = " ".join((ROOT / page).read_text().split())
        assert re.findall(r"median error is ([\d.]+) %", said) == [median], page


def test_the_python_example_plans(capsys) -> None:
    import turbofit

    code = next(line for line in TEXT.splitlines() if line.startswith("plan = turbofit.plan("))
    found: dict[str, Plan] = {}
    exec(code, {"turbofit": turbofit}, found)
    assert found["plan"].fits
    assert json.loads(found["plan"].to_json())["engine"]["name"] == "pytorch"
