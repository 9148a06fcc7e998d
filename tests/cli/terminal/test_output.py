from __future__ import annotations

import json
import logging

import pytest

from turbofit.cli.main import main
from turbofit.cli.terminal.output import verbose_log
from turbofit.core.process.log import LazyLogger

PLAN = ["plan", "internvl2-8b", "--on", "1xrtx3090", "--json"]
Out = pytest.CaptureFixture[str]


def levels(text: str) -> set[str]:
    """Which levels a log has."""
    return {line.split()[2] for line in text.splitlines()}


@pytest.mark.parametrize(
    ("option", "said"),
    [([], set()), (["-v"], {"INFO"}), (["--verbose"], {"INFO"}), (["-vv"], {"INFO", "DEBUG"})],
)
def test_the_log_goes_to_stderr_and_json_stays_json(
    option: list[str], said: set[str], capsys: Out
) -> None:
    assert main([*PLAN, *option]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"]
    assert levels(captured.err) == said
    assert not logging.getLogger("turbofit").handlers


def test_the_search_is_told(capsys: Out) -> None:
    main([*PLAN, "-v"])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "tuner.search" in one]
    assert "turbomind on 1xrtx3090: 4 shapes looked at, 4 fit; the best: tp 1 x 1" in line


def test_errors_keep_their_two_lines_below_the_log(capsys: Out) -> None:
    assert main(["machine", "--on", "2xrtx3090", "--gpus", "7", "-v"]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error", "hint",
    ]  # fmt: skip


def test_names_of_others_cannot_steer_the_terminal(capsys: Out) -> None:
    with verbose_log(1):
        LazyLogger("turbofit.x").info("read %s", "a\x1b[2J\nb")
    assert capsys.readouterr().err.endswith("INFO turbofit.x: read a?[2J?b\n")


def test_the_level_is_as_before_afterwards() -> None:
    logger = logging.getLogger("turbofit")
    logger.setLevel(logging.ERROR)
    try:
        with verbose_log(2):
            assert logger.level == logging.DEBUG
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(logging.NOTSET)
