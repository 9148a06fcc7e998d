from __future__ import annotations

from typing import Any

import pytest

from turbofit.cli.command import CliCommand, Option, split_rest
from turbofit.core.errors import UsageError, option_of


def read(*words: str, takes_rest: bool = False) -> dict[str, Any]:
    """What a command with one option of each kind reads."""
    params = [
        Option("--origins", several=True),
        Option("--key", multiple=True),
        Option("--name"),
        Option("--schema", is_flag=False, flag_value="plan"),
        Option("--json", "as_json", is_flag=True, form=True),
        Option("--md", is_flag=True, form=True),
    ]
    reader = CliCommand(lambda **_: 0, params, takes_rest=takes_rest)
    with reader.make_context("turbofit", list(words)) as ctx:
        return ctx.params


def test_what_an_option_takes() -> None:
    given = read("--origins", "a", "b", "--json", "--key", "k", "--key", "l")
    assert (given["origins"], given["key"], given["form"].as_json) == (("a", "b"), ("k", "l"), True)
    assert read("--origins", "a", "b", "--origins", "c")["origins"] == ("c",)  # the last one counts
    assert (read("--schema")["schema"], read("--schema", "run")["schema"]) == ("plan", "run")
    assert (read("--name", "-5")["name"], read("--name", "-")["name"]) == ("-5", "-")
    assert option_of("max_batch_size") == "--max-batch-size"
    assert option_of("async_") == "--async"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "--json"], "--name needs a value before --json"),
        (["--name", "--nonsense"], "--name needs a value before --nonsense"),
        (["--nonsense"], "unknown option --nonsense"),
        (["--key", "--name=x"], "--key needs a value before --name=x"),
        (["--origins", "--json"], "option '--origins' requires an argument"),
        (["word"], "unexpected extra argument"),
    ],
)
def test_what_is_no_command_line(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert said in caught.value.message
    assert caught.value.hint


def test_what_follows_two_dashes_is_somebody_elses() -> None:
    assert read("--name", "x", "--", "--name", "y", takes_rest=True)["rest"] == ["--name", "y"]
    assert split_rest(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])
