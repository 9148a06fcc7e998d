from __future__ import annotations

from typing import Any

import pytest

from turbofit.cli.command import CliCommand, Option, option_name, split_rest
from turbofit.core.errors import UsageError


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


def test_an_option_of_several_words_takes_all_up_to_the_next_option() -> None:
    given = read("--origins", "a", "b", "--json", "--key", "k", "--key", "l")
    assert (given["origins"], given["key"], given["form"].as_json) == (("a", "b"), ("k", "l"), True)


def test_the_last_of_them_counts() -> None:
    assert read("--origins", "a", "b", "--origins", "c")["origins"] == ("c",)


def test_an_option_may_stand_without_a_value_where_it_has_one_of_its_own() -> None:
    assert (read("--schema")["schema"], read("--schema", "run")["schema"]) == ("plan", "run")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name", "--json"], "--name needs a value before --json"),
        (["--name", "--json=1"], "--name needs a value before --json=1"),
        (["--name", "--nonsense"], "--name needs a value before --nonsense"),
        (["--key", "--name=x"], "--key needs a value before --name=x"),
        (["--origins", "--json"], "option '--origins' requires an argument"),
        (["--json", "--md"], "--json and --md do not go together"),
        (["word"], "unexpected extra argument"),
        (["--", "x"], "takes nothing after --"),
    ],
)
def test_what_is_no_command_line(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_value_may_begin_with_one_dash() -> None:
    assert read("--name", "-5")["name"] == "-5"
    assert read("--name", "-")["name"] == "-"


def test_what_follows_two_dashes_is_somebody_elses() -> None:
    assert read("--name", "x", "--", "--name", "y", takes_rest=True)["rest"] == ["--name", "y"]
    assert split_rest(["a", "--", "b", "--", "c"]) == (["a"], ["b", "--", "c"])


def test_an_option_is_called_as_its_field() -> None:
    assert option_name("max_batch_size") == "--max-batch-size"
    assert option_name("async_") == "--async"
