"""``turbofit doctor --kernels`` as people type it."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main

Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize(("card", "name"), [("rtx5090", "sm_120a"), ("rtx3090", "sm_86")])
def test_a_row_for_each_family_and_the_architecture_of_the_card(
    card: str, name: str, capsys: Out
) -> None:
    assert main(["doctor", "--kernels", "--on", f"1x{card}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Kernels of TurboMind")
    assert name in shown
    assert "decode bfloat16 int8 128" in shown
