"""Words of others, and turbofit's own for each, as presets/neighbours.yaml has them."""

from __future__ import annotations

import click
import pytest

import turbofit
from turbofit.cli.main import TURBOFIT
from turbofit.cli.manual import COMMANDS
from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import counted, neighbour, neighbours

FIELDS = {
    name: {str(param.name) for param in TURBOFIT.get_command(click.Context(TURBOFIT), name).params}
    for name in COMMANDS
}
ROWS = [
    (command, word, row)
    for command, rows in neighbours()["options"].items()
    for word, row in rows.items()
]


@pytest.mark.parametrize(("command", "word", "row"), ROWS)
def test_a_row_is_no_option_and_names_one_that_some_command_has(command, word, row) -> None:
    having = [name for name, fields in FIELDS.items() if row.get("here") in fields]
    assert having or "here" not in row
    for name in having:
        assert word.replace("-", "_") not in FIELDS[name] or name not in (command, "every")
        assert option_of(row["here"]) in neighbour(f"--{word}", FIELDS[name], option_of, command)
    assert neighbour("--no-such-word", FIELDS["plan"], option_of) == ""


def test_a_row_counts_where_the_command_has_its_option() -> None:
    assert neighbour("--time", FIELDS["bench"], option_of) == "here: --seconds"
    assert neighbour("--time", FIELDS["plan"], option_of) == ""


def test_first_words_are_no_commands_and_others_are() -> None:
    assert not neighbours()["commands"].keys() & COMMANDS.keys()
    assert neighbours()["arguments"].keys() <= COMMANDS.keys()


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("gpu", "here: on, as "), ("max_new_tokens", "here: output_tokens"),
        ("concurency", "did you mean concurrency?"),
        ("users", "here: concurrency"), ("max_model_len", "an option of vLLM; here: context"),
        ("backend_config", "here its fields are keywords"),
    ],
)  # fmt: skip
def test_keywords_of_python_have_the_same_neighbours(keyword: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        turbofit.plan("internvl2-8b", on="1xrtx3090", **{keyword: 1})
    assert hint in caught.value.hint


def test_a_number_stands_with_its_noun() -> None:
    assert [counted(n, "patch") for n in (0, 1, 1024)] == ["0 patches", "1 patch", "1,024 patches"]
