"""Given values become words of a command line."""

from __future__ import annotations

from typing import Annotated

from turbofit.core.validation import SECONDS, Validated


class Asked(Validated):
    count: int = 4
    size: tuple[int, int] | None = None
    eager: bool | None = None
    options: dict[str, int] | None = None
    pause: Annotated[float, SECONDS] = 1.0


def test_given_values_are_words_of_a_command_line() -> None:
    asked = Asked.of(size=(640, 480), eager=False, options={"a": 1}, pause="2m")
    assert asked.changed(count=2).option_arguments() == [
        "--count", "2", "--size", "640x480", "--no-eager", "--options", '{"a": 1}',
        "--pause", "120.0",
    ]  # fmt: skip
