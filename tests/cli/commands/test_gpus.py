"""``turbofit gpus`` as people type it."""

from __future__ import annotations

import json

import pytest

from turbofit.cli.main import main


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["4090"], {"rtx4090", "rtx4090-48g", "rtx4090d"}),
        (["RTX 3080"], {"rtx3080", "rtx3080-12g", "rtx3080ti"}),
        (["a100", "80gb"], {"a100-80g", "a100-pcie-80g"}),
    ],
)
def test_words_show_the_cards_that_have_them(
    words: list[str], names: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpus", *words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["gpus"]) == names


def test_a_card_without_a_preset_is_answered_as_by_a_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["gpus", "titan", "rtx"]) == 2
    assert "titanrtx:total=" in capsys.readouterr().err
