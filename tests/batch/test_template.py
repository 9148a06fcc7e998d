from __future__ import annotations

import pytest

from turbofit.batch.template import PromptTemplate
from turbofit.core.errors import UsageError


def test_placeholders_are_filled_and_other_braces_stay() -> None:
    text = 'What is {name}? Answer {"a": {"b": 1}} or {} or {{name}}.'
    filled = PromptTemplate(text, ("name",)).fill({"name": "{x}"})
    assert filled == 'What is {x}? Answer {"a": {"b": 1}} or {} or {name}.'


def test_placeholders_that_stand_in_a_prompt_are_known() -> None:
    assert PromptTemplate("{a} {a} {{b}}", ("a", "b", "c")).used == {"a"}


def test_a_placeholder_that_there_is_not_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"\{nam\} in the prompt is no placeholder") as caught:
        PromptTemplate("{nam}", ("name", "a column"))
    assert caught.value.hint == "there are {name}, {a column}; write {{nam}} for {nam} itself"


def test_a_column_may_have_spaces() -> None:
    assert PromptTemplate("{a b}", ("a b",)).fill({"a b": "1"}) == "1"
