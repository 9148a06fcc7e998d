from __future__ import annotations

import pytest

from tests.batch.standin import items_of
from turbofit.batch.item import BatchItem
from turbofit.batch.output_file import Survey
from turbofit.core.errors import UsageError


def test_items_are_counted_and_marked_once() -> None:
    survey = Survey(items_of([5, 0, 7, 0, 9]))
    assert survey.total == 3
    assert survey.holds(1, 5)
    assert not any(
        survey.holds(*one) for one in ((0, 0), (0, 5), (2, 5), (6, 1), (10**11, 1), (3, 8))
    )
    assert list(survey.done) == [0] * 6


def test_an_empty_input_has_no_items() -> None:
    assert Survey([]).total == 0


def test_order_is_a_beginning() -> None:
    survey = Survey(items_of([1, 0, 1, 1]))
    survey.check_order()
    survey.done[1] = True
    survey.done[3] = True
    survey.check_order()
    other = Survey(items_of([1, 0, 1, 1]))
    other.done[4] = True
    with pytest.raises(UsageError, match="item 4 has its line and item 1 has none"):
        other.check_order()


def test_a_name_that_came_before_is_the_second_items_failure() -> None:
    items = [
        BatchItem(number=1, digest=1, custom_id="a"),
        BatchItem(number=2, digest=2, custom_id="b"),
        BatchItem(number=3, digest=3, custom_id="a"),
        BatchItem(number=4, digest=4),
        BatchItem(number=5, digest=5),
    ]
    survey = Survey(items)
    survey.done[1] = True
    found = list(survey.pending(iter(items)))
    assert [one.fault and one.fault.code for one in found] == [
        None, "duplicate_custom_id", None, None,
    ]  # fmt: skip


def test_an_input_that_changes_meanwhile_is_noticed() -> None:
    survey = Survey(items_of([1, 2]))
    for item in (BatchItem(number=2, digest=3), BatchItem(number=3, digest=1)):
        with pytest.raises(UsageError, match=f"while it was read, at item {item.number}"):
            list(survey.pending(iter([item])))


def test_an_input_that_gets_shorter_meanwhile_is_noticed() -> None:
    found = Survey(items_of([1, 2, 3])).pending(iter(items_of([1, 2])))
    assert [next(found), next(found)] == items_of([1, 2])
    with pytest.raises(UsageError, match="while it was read, it had 3 items and has 2"):
        next(found)
