from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from turbofit.cli.command import CliCommand
from turbofit.cli.options.common_options import filled, options_of
from turbofit.core.errors import UsageError
from turbofit.core.validation import Metavar, Validated


class Asked(Validated):
    """One field of each kind."""

    count: Annotated[int, Field(ge=1), Metavar("N")] | None = Field(
        default=4, description="how many"
    )
    goal: Literal["speed", "memory"] | None = None
    sizes: tuple[Annotated[int, Metavar("BYTES")], ...] = ()
    keys: tuple[Annotated[str, Metavar("KEY", repeatable=True)], ...] = ()
    eager: bool = False
    seconds: float = 1.0


def reader() -> CliCommand:
    """A command with an option for each field."""
    return CliCommand(lambda **_: 0, [*options_of(Asked, Asked.model_fields)])


def given(*words: str) -> Asked:
    with reader().make_context("turbofit", list(words)) as ctx:
        return filled(Asked, ctx.params)


def test_fields_are_filled_and_what_is_not_given_is_not() -> None:
    words = "--count 2 --goal speed --sizes 1 2 --keys a --keys b --eager --seconds 0"
    assert given(*words.split()).given() == {
        "count": 2, "goal": "speed", "sizes": (1, 2), "keys": ("a", "b"), "eager": True,
        "seconds": 0.0,
    }  # fmt: skip
    assert given().given() == {}
    assert given().count == 4


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--count", "0"], "--count '0': it should be 1 or more", "--count: how many"),
        (["--count", "x"], "--count 'x': it should be a whole number", "--count: how many"),
        (["--goal", "sped"], "--goal 'sped': it should be", "did you mean speed?"),
        (["--sizes", "1", "x"], "--sizes 'x': it should be a whole number", "another --sizes"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        given(*words)
    assert message in caught.value.message
    assert hint in caught.value.hint
