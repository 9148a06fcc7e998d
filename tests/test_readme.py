"""README, pages of docs and rows of bench/advice say what the commands in them say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from scripts import record
from turbofit.cli.main import main
from turbofit.cli.manual import COMMANDS
from turbofit.core.plan import Plan
from turbofit.core.units import MIB

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
        assert figure in f"{plan.verdict}; {plan.kv_tokens:,} KV tokens"
    named = [name for name in ENGINES if answer.startswith(name)]
    assert all(plan.backend.name == ENGINES[name] for name in named)
    dtypes = re.findall(r"\bb?float16\b", answer)
    assert not dtypes or plan.engines[0].settings.dtype == dtypes[0]
    shape = re.search(r"(two|four) (?:copies|engines)(?:.*? of tp (\d))?", answer)
    if shape is not None:
        assert plan.replicas == {"two": 2, "four": 4}[shape[1]]
        assert plan.tp == int(shape[2] or 1)


def test_the_picture_at_the_top_is_what_the_command_says() -> None:
    assert record.COMMAND in TEXT
    assert record.SHOWN.read_text() == record.drawn(), "run python scripts/record.py"


def test_it_is_short_and_every_command_is_on_its_page() -> None:
    for page in ("README.md", "README.zh-CN.md"):
        assert len((ROOT / page).read_text().splitlines()) <= 100, page
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
    assert f"counts within {bars['KV block count within 2 %']}" in said
    missed = bars["no row that ran is forecast to run out"].split(", ")
    assert len(missed) == 3
    missed += bars["no row that ran out is forecast to keep more than the margin"].split(", ")
    assert all(f"`{name}`" in said for name in missed)


def test_what_is_gained_is_what_the_benches_and_commands_say(capsys) -> None:
    plan = plan_of("plan internvl2-8b --on 1xrtx3090", capsys)
    main(["predict", "internvl2-8b", "--on", "1xrtx3090", "--json"])
    alone = json.loads(capsys.readouterr().out)["verdict"]
    (short,) = re.findall(r"meet in one forward.*\((\d+ MiB) short\)", alone)
    gateway, images = (
        (ROOT / "bench" / name / "RESULTS.md").read_text() for name in ("gateway", "images")
    )
    text, image = (float(cells[3].split()[0]) for cells in rows(gateway, "| request | direct")[:2])
    quiet = rows(images, "| model | image | ms of processor time")
    plain, ours = next(cells[5:7] for cells in quiet if cells[1] == "1920x1080")
    outages = rows((ROOT / "docs" / "operations.md").read_text(), "| from … to the next answer")
    median, worst = outages[0][1].split(", ")
    (under,) = re.findall(r"^\| h100 \|.*\| pytorch \| -(\d+) MiB", ACCURACY_PAGE, re.MULTILINE)
    for page in ("README.md", "README.zh-CN.md"):
        said = " ".join((ROOT / page).read_text().split())
        for figure in (
            short, f"{plan.kv_tokens:,}", f" {plan.requests_at_once} ", f"| {plain} | {ours}",
            f"{text:.1f} ms", f"{image:.1f} ms", f"{median} s", f"{worst} s", f" {under} MiB",
        ):  # fmt: skip
            assert figure in said, (page, figure)


def test_what_queued_images_gain_is_what_the_plans_say(capsys) -> None:
    queued, not_queued = (
        f"{plan_of(f'plan qwen2-vl-7b --on 1xrtx3090 {one}', capsys).kv_tokens:,}"
        for one in ("--queue-images", "--no-queue-images")
    )
    said = " ".join(COMMANDS_PAGE.split())
    assert f"Qwen2-VL-7B on a 3090: {queued} KV tokens instead of {not_queued};" in said


def test_the_error_of_the_forecast_of_speed_is_quoted_as_it_was_reached() -> None:
    results = (ROOT / "bench" / "speed" / "RESULTS.md").read_text()
    (median,) = re.findall(r"^\| median error at most 25% \| ([\d.]+)% \|", results, re.MULTILINE)
    page = (ROOT / "docs" / "speed.md").read_text()
    assert re.findall(r"median\s+error\s+is\s+([\d.]+)\s+%", page) == [median]


def test_the_python_example_plans(capsys) -> None:
    import turbofit

    code = next(line for line in TEXT.splitlines() if line.startswith("plan = turbofit.plan("))
    found: dict[str, Plan] = {}
    exec(code, {"turbofit": turbofit}, found)
    assert found["plan"].fits
    assert json.loads(found["plan"].to_json())["backend"]["name"] == "pytorch"


ADVICE_PAGE = (ROOT / "bench" / "advice" / "RESULTS.md").read_text()
#: What was advised, what that does, how it is judged, and the command that computes it.
ADVICE = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) \| `(p.+?)` \|$", ADVICE_PAGE, re.MULTILINE)
#: How the page says an end, and how a verdict says it.
ENDS = {
    "dies while loading": "while loading",
    "never starts": "never starts",
    "dies in its warm-up or of the first image": "warm-up",
    "dies of one image": "one image request at the limit",
    "dies of an image beside long prompts": "an image in a forward with the longest prompts",
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
    serves = plan.fits or ": serves" in plan.verdict or " keeps " in plan.verdict
    assert serves == does.startswith("lives"), plan.verdict
    if not serves:
        end, _, short = does.removesuffix(" short").partition(", ")
        assert ENDS[end] in plan.verdict
        assert re.search(rf"{re.escape(short)} (short|more)", plan.verdict)
    elif "one request" in does:
        assert f"one request of {plan.engines[0].settings.session_len:,} tokens at a time" in does
        layers = re.search(r"(\d+ of \d+) layers on no GPU: at best ([\d.]+ s a token)", does)
        assert layers is None or all(one in " ".join(plan.warnings) for one in layers.groups())
    else:
        assert f"lives, {plan.kv_tokens:,} tokens" in does
        spare = min(gpu.headroom for gpu in plan.ledgers) // MIB
        assert plan.fits or f", {spare} MiB to spare" in does
    return serves


@pytest.mark.parametrize(
    ("advice", "does", "judged", "command"), ADVICE, ids=[row[3] for row in ADVICE]
)
def test_a_row_is_what_its_command_says(advice, does, judged, command, capsys) -> None:
    serves = check(command, does, capsys)
    assert not judged.startswith("helps") or serves
    assert not re.match("no help|not enough|worse|cannot be", judged) or not serves
    better = re.match(r"([\d.]+) times the tokens of \"(.+?)\"", judged)
    if better is not None:
        others = [tokens(row[1]) for row in ADVICE if row[0] == better[2]]
        assert better[1] in [f"{tokens(does) / other:.2g}" for other in others if other]
    alike = re.search(r"about as many tokens as \"(.+?)\"", judged)
    if alike is not None:
        others = [tokens(row[1]) for row in ADVICE if row[0] == alike[1] and tokens(row[1])]
        assert any(abs(tokens(does) - other) <= 0.02 * other for other in others)
    older = re.search(r"on ([\d.]+): ([^;]+)", judged)
    # What others hold is another figure there: of what that version itself takes.
    if older is not None and not re.search(":(free|used)=", command):
        check(f"{command} --lmdeploy {older[1]}", older[2], capsys)


def test_the_page_of_cases_quotes_the_rows() -> None:
    table = CASES_PAGE[CASES_PAGE.index("| case | advice |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    assert all(row in ADVICE_PAGE for row in table)
    assert len(ADVICE) >= 40
