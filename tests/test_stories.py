"""The five stories of docs/cases.md, from outside: their words and logs, and what is said first.

A newcomer reads the first lines of an answer. So what must stand in the first five stands here.
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
_STACK = re.compile(r'Traceback|  File "|    \S')


class Story(NamedTuple):
    """A section of the page: what somebody writes of it, the log, and what the page quotes."""

    text: str
    log: str
    quotes: list[str]

    @property
    def without_stack(self) -> str:
        lines = self.log.splitlines()
        return "\n".join(line for line in lines if not _STACK.match(line))

    @property
    def one_line(self) -> str:
        return self.log.splitlines()[-1]


def stories(page: str) -> list[Story]:
    found = []
    for match in _SECTION.finditer((DOCS / page).read_text(encoding="utf-8")):
        text = " ".join(line.removeprefix("> ") for line in match["text"].splitlines())
        answer = " ".join(match["answer"].split())
        found.append(Story(text, match["log"].strip(), re.findall(r'"([^"]+)"', answer)))
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
    """What stands in the first five lines of an answer."""
    return plain("\n".join(said.splitlines()[:5]))


def test_both_pages_have_the_five_logs() -> None:
    assert len(ENGLISH) == 5
    assert [story.log for story in ENGLISH] == [story.log for story in CHINESE]
    assert [story.quotes for story in ENGLISH] == [story.quotes for story in CHINESE]


@pytest.mark.parametrize("number", range(5))
def test_the_page_quotes_the_answer(typed, number: int) -> None:
    said = plain(typed("diagnose", ENGLISH[number].log))
    assert [quote for quote in ENGLISH[number].quotes if quote not in said] == []


ONCE = "load the model once, and let it be split over the cards"
NAMED = "name the model with --model, and paste the line"


@pytest.mark.parametrize(
    ("number", "part", "words"),
    [
        (INTERNVL, "log", ["when it encoded images", "start the engine once"]),
        (INTERNVL, "without_stack", ["out of GPU memory", "start the engine once"]),
        (INTERNVL, "one_line", ["out of GPU memory", NAMED]),
        (INTERNVL, "text", ["out of GPU memory", "a lower --cache-max-entry-count"]),
        (LORA, "log", ["puts part of the model on disk", "turbofit doctor"]),
        (LORA, "without_stack", ["puts part of the model on disk", "turbofit doctor"]),
        (LORA, "one_line", ["puts part of the model on disk", "turbofit doctor"]),
        (LORA, "text", ["puts part of the model on disk", "turbofit doctor"]),
        (L4, "log", ["in a forward of the language model", "restart the notebook's kernel"]),
        (L4, "without_stack", ["out of GPU memory", "restart the notebook's kernel"]),
        (L4, "one_line", ["out of GPU memory", NAMED]),
        (L4, "text", ["out of GPU memory", 'paste the line "CUDA out of memory.']),
        (QWEN, "log", ["cuda:0 and cuda:1", "use one card where the model fits on one"]),
        (QWEN, "without_stack", ["cuda:0 and cuda:1", "use one card"]),
        (QWEN, "one_line", ["cuda:0 and cuda:1", "use one card"]),
        (QWEN, "text", ["use one card where the model fits on one"]),
        (COGVLM, "log", ["while it loaded weights", ONCE]),
        (COGVLM, "without_stack", ["out of GPU memory", ONCE]),
        (COGVLM, "one_line", ["out of GPU memory", NAMED]),
        (COGVLM, "text", ["runs out of memory", "one whole model for each device"]),
    ],
)  # fmt: skip
def test_the_first_five_lines_have_the_cause_or_the_next_step(
    typed, number: int, part: str, words: list[str]
) -> None:
    said = first_lines(typed("diagnose", getattr(ENGLISH[number], part)))
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["en", "zh"])
@pytest.mark.parametrize("number", range(5))
def test_a_text_names_its_model_and_cards(typed, page: list[Story], number: int) -> None:
    said = typed("diagnose", page[number].text)
    models = ["InternVL2-8B", "LLaVA-1.5-7B", "LLaVA-1.5-7B", "Qwen2-VL-7B-Instruct", "CogVLM-17B"]
    assert f"model {models[number]}" in plain(said)
    cards = ["4xrtx3090", "4xrtx3090", "1xl4", "the log names 1x v100-32g, 2x rtx4090", "2xrtx3090"]
    assert cards[number] in plain(said)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("internvl2-8b --on 4张3090 --tp 4", ["fits: InternVL2-8B on GPU 0+1+2+3"]),
        ("internvl2-8b --on 4xrtx3090", ["fits: InternVL2-8B on GPU 0-3"]),
        ("llava-1.5-7b --on 4xrtx3090", ["fits: LLaVA-1.5-7B on GPU 0-3"]),
        ("llava-1.5-7b --on 1xl4:free=19GiB", ["fits: LLaVA-1.5-7B on GPU 0"]),
        ("qwen2-vl-7b --on 1xv100-32g", ["fits: Qwen2-VL-7B-Instruct on GPU 0"]),
        ("qwen2-vl-7b --on 2xrtx4090", ["fits: Qwen2-VL-7B-Instruct on GPU 0-1"]),
        ("llava-onevision-7b --on 2xrtx4090", ["on GPU 0 with Transformers"]),
        ("llama-3.2-11b-vision --on 1xv100-32g", ["on GPU 0 with Transformers"]),
        ("cogvlm-17b --on 2xrtx3090", ["fits: CogVLM-17B on GPU 0+1"]),
    ],
)
def test_a_plan_says_first_that_it_fits_and_where(typed, command: str, words: list[str]) -> None:
    said = first_lines(typed("plan", *command.split()))
    assert [word for word in words if word not in said] == []


def test_an_older_lmdeploy_is_told_below_which_free_memory_it_dies(typed) -> None:
    words = "internvl2-8b --on 4xrtx3090 --tp 4 --lmdeploy 0.5.0"
    said = first_lines(typed("predict", *words.split()))
    assert "serves" in said
    assert "MiB free when the cache is sized it starts, then aborts on image requests" in said
