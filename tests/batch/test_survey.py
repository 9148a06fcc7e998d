from __future__ import annotations

import pytest

from turbofit.batch.survey import Survey
from turbofit.core.errors import UsageError


def test_items_are_counted_and_marked_once() -> None:
    survey = Survey([5, 0, 7, 0, 9])
    assert survey.total == 3
    assert survey.holds(1, 5)
    assert not any(
        survey.holds(*one) for one in ((0, 0), (0, 5), (2, 5), (6, 1), (10**11, 1), (3, 8))
    )
    assert survey.mark(3)
    assert survey.done(3)
    assert not survey.mark(3)
    assert not survey.done(1)


def test_an_empty_input_has_no_items() -> None:
    assert Survey([]).total == Survey([0, 0]).total == 0


def test_order_is_a_beginning() -> None:
    survey = Survey([1, 0, 1, 1])
    survey.check_order()
    survey.mark(1)
    survey.mark(3)
    survey.check_order()
    other = Survey([1, 0, 1, 1])
    other.mark(4)
    with pytest.raises(UsageError, match="item 4 has its line and item 1 has none"):
        other.check_order()


def test_what_a_tick_raises_ends_the_reading() -> None:
    seen = []

    def tick(number: int) -> None:
        seen.append(number)
        raise KeyError

    with pytest.raises(KeyError):
        Survey(iter([1] * 100000), tick)
    assert seen == [4096]
