"""`turbofit machine`, `models` and `gpus`: what was measured, and what has a name."""

from __future__ import annotations

import json

import pytest

from turbofit.cli.main import main
from turbofit.core.machine import Machine
from turbofit.core.struct import decode


def test_a_machine_is_shown_saved_and_read_again(tmp_path, capsys) -> None:
    path = tmp_path / "machine.json"
    assert main(["machine", "--on", "2xl4:free=19GiB", "--save", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    shown = decode(captured.out, Machine, what="machine")
    assert len(shown.gpus) == 2
    assert str(path) in captured.err
    assert main(["machine", "--on", str(path), "--json"]) == 0
    assert decode(capsys.readouterr().out, Machine, what="machine").gpus == shown.gpus
    assert main(["machine", "--on", "2xl4", "--save", "/no/such/folder/x"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "md"])
def test_hub_ids_stand_in_markdown_alone(form: str, capsys) -> None:
    assert main(["models", "--md"] if form == "md" else ["models"]) == 0
    known = capsys.readouterr().out.partition("Not planned for")[0]
    assert ("hub id" in known) is ("OpenGVLab/" in known) is (form == "md")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["4090"], {"rtx4090", "rtx4090-48g", "rtx4090d"}),
        (["RTX 3080"], {"rtx3080", "rtx3080-12g", "rtx3080ti"}),
        (["a100", "80gb"], {"a100-80g", "a100-pcie-80g"}),
    ],
)
def test_words_show_the_cards_that_have_them(words: list[str], names: set[str], capsys) -> None:
    assert main(["gpus", *words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["gpus"]) == names


def test_a_word_shows_the_models_that_have_it(capsys) -> None:
    assert main(["models", "awq"]) == 0
    planned, unsupported = capsys.readouterr().out.split("\n\n")
    heading, columns, *rows = planned.splitlines()
    assert (heading, "context" in columns, len(rows) > 5) == ("Models", True, True)
    assert any(row.startswith("  internvl2-8b-awq ") for row in rows)
    title, *reasons = unsupported.split("\n  - ")
    assert (title, len(reasons) > 2) == ("Not planned for", True)
    assert all("awq" in reason.partition(":")[0] for reason in reasons)
    assert main(["models", "internvl2-8b", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert models["internvl2-8b"]["parameters"] == 8_075_365_376
    assert main(["gpus", "titan", "rtx"]) == 2  # a card without a preset, as a plan answers
    assert "titanrtx:total=" in capsys.readouterr().err
