"""`turbofit tune` refuses, before it measures, what a load cannot measure."""

from __future__ import annotations

import pytest

from turbofit.cli.main import main


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--goal", "context"], "a load does not measure context"),
        (["--time", "soon"], "--time"),
        (["--slo", "nothing=2s"], "nothing"),
        (["--slo", ""], "write it as ttft=2s"),
    ],
)
def test_what_a_load_does_not_measure(words: list[str], cause: str, capsys) -> None:
    assert main(["tune", "internvl2-2b", "--on", "1xrtx3090", "--pretend", *words]) == 2
    assert cause in capsys.readouterr().err
