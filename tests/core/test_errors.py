"""Errors as documents, and back."""

from __future__ import annotations

import pytest

from turbofit.core.errors import LaunchError, TurbofitError, error_from


@pytest.mark.parametrize("kind", TurbofitError.__subclasses__())
def test_an_error_from_another_machine_is_the_same_here(kind: type[TurbofitError]) -> None:
    made = kind("it\n did not", hint="do this")
    again = error_from(made.to_dict()["error"])
    assert type(again) is kind
    assert (again.message, again.hint) == ("it did not", "do this")


def test_one_of_no_kind_is_of_the_launch() -> None:
    again = error_from({"message": "a bug in turbofit", "exit_code": 1})
    assert type(again) is LaunchError
    assert again.message == "a bug in turbofit"
