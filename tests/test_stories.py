"""The five stories of docs/cases.md, from outside: their words and logs, and what is said first.

A newcomer reads the first lines of an answer. So what must stand in the first eight stands here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from turbofit.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
_SECTION = re.compile(r"^### [^\n]+\n\n(?P<text>(?:> [^\n]*\n)+)\n```text\n(?P<log>.*?)```\n\n"
                      r"(?P<answer>.*?)(?=\n##|\Z)", re.MULTILINE | re.DOTALL)  # fmt: skip


class Story(NamedTuple):
    """A section of the page: what somebody writes of it, the log, and the answer's first lines.

    ``quotes`` are of what follows them.
    """

    text: str
    log: str
    first: str
    quotes: list[str]


def stories(page: str) -> list[Story]:
    found = []
    for match in _SECTION.finditer((DOCS / page).read_text(encoding="utf-8")):
        text = " ".join(line.removeprefix("> ") for line in match["text"].splitlines())
        _, first, more = match["answer"].split("```", 2)
        quotes = re.findall(r'"([^"]+)"', " ".join(more.split()))
        found.append(Story(text, match["log"].strip(), first.removeprefix("text\n"), quotes))
    return found


ENGLISH, CHINESE = stories("cases.md"), stories("zh/cases.md")
INTERNVL, LORA, L4, QWEN, COGVLM = range(5)


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> str:
        assert main(list(words)) in (0, 3)
        return capsys.readouterr().out

    return run


def plain(text: str) -> str:
    return " ".join(text.split())


def first_lines(said: str) -> str:
    """What stands in the first five lines of a plan."""
    return plain("\n".join(said.splitlines()[:5]))


def test_both_pages_have_the_five_logs() -> None:
    assert len(ENGLISH) == 5
    assert [story.log for story in ENGLISH] == [story.log for story in CHINESE]
    assert [story.first for story in ENGLISH] == [story.first for story in CHINESE]
    assert [story.quotes for story in ENGLISH] == [story.quotes for story in CHINESE]


@pytest.mark.parametrize("number", range(5))
def test_the_page_quotes_the_answer(typed, number: int) -> None:
    answer = typed("diagnose", ENGLISH[number].log)
    assert ENGLISH[number].first.startswith("What happened\n")
    assert answer.startswith(ENGLISH[number].first)
    assert len(ENGLISH[number].first.splitlines()) <= 20
    said = plain(answer)
    assert [quote for quote in ENGLISH[number].quotes if quote not in said] == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (INTERNVL, ["when it encoded images", "it asked 1.2 GiB where 556 MiB were left",
                    "start the engine once"]),
        (LORA, ["puts part of the model on disk", "13.2 GiB of weights, and one of the cards",
                "turbofit doctor"]),
        (L4, ["in a forward of the language model", "14.0 MiB where 8.9 MiB were left",
              "restart the notebook's kernel"]),
        (QWEN, ["cuda:0 and cuda:1", "use one card, since", "15.4 GiB of weights"]),
        (COGVLM, ["while it loaded weights", "136 MiB where 43.7 MiB were left",
                  "load the model once, and let it be split over the cards"]),
    ],
)  # fmt: skip
def test_the_first_eight_lines_have_the_cause_the_number_and_the_step(
    typed, number: int, words: list[str]
) -> None:
    """From the log alone: without --model and --on."""
    said = plain("\n".join(typed("diagnose", ENGLISH[number].log).splitlines()[:8]))
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
@pytest.mark.parametrize("number", range(5))
def test_a_text_names_its_model_and_cards(
    page: list[Story], number: int, capsys, monkeypatch
) -> None:
    """From sentences, which are told so where no line of a program is in them."""
    monkeypatch.setenv("COLUMNS", "80")
    main(["diagnose", page[number].text])
    said = "".join(capsys.readouterr())
    models = ["InternVL2-8B", "LLaVA-1.5-7B", "LLaVA-1.5-7B", "Qwen2-VL-7B-Instruct", "CogVLM-17B"]
    assert re.search(f"(?:model|turbofit plan) {re.escape(models[number])}", plain(said))
    cards = ["4xrtx3090", "4xrtx3090", "1xl4", "the log names 1x v100-32g, 2x rtx4090", "2xrtx3090"]
    assert cards[number] in plain(said)


def test_an_older_lmdeploy_is_told_below_which_free_memory_it_dies(typed) -> None:
    words = "internvl2-8b --on 4xrtx3090 --tp 4 --lmdeploy 0.5.0"
    said = first_lines(typed("predict", *words.split()))
    assert "serves" in said
    assert "MiB free when the cache is sized it starts, then aborts on image requests" in said
