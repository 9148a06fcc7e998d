"""A model that one program held more than once: by its loads, its traceback, or its figures."""

from __future__ import annotations

import pytest

from tests.logs.conftest import explain, explain_file, some
from turbofit.logs.causes import text_of

HELD = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 14.00 MiB. GPU 0 has a total"
    " capacity of {total} GiB of which 8.88 MiB is free. Including non-PyTorch memory, this process"
    " has {held} GiB memory in use."
)
ALLOCATED = HELD + (
    " Of the allocated memory {allocated} GiB is allocated by PyTorch, and 41.70 MiB is reserved by"
    " PyTorch but unallocated."
)


def why(text: str, **options: str) -> str:
    return " ".join(explain(text, **options).why)


def test_what_is_beyond_one_copy_is_told_with_the_ways_to_it() -> None:
    text = ALLOCATED.format(total="22.17", held="22.15", allocated="21.86")
    told = why(text, model="llava-1.5-7b")
    words = (
        "LLaVA-1.5-7B has 13.2 GiB of weights", "a notebook cell that ran twice",
        "5.3 GiB of what this process held are beyond that",
        "or its weights were loaded in 32 bits",
    )  # fmt: skip
    assert [text for text in words if text not in told] == []


@pytest.mark.parametrize(
    "text",
    [
        ALLOCATED.format(total="22.17", held="14.25", allocated="13.93"),
        "lmdeploy serve api_server a/b\n"
        + ALLOCATED.format(total="22.17", held="22.15", allocated="21.86"),
        '  File "/w/train.py", line 3, in step\n    loss.backward()\n'
        + ALLOCATED.format(total="22.17", held="22.15", allocated="21.86"),
    ],
    ids=["one copy", "an engine with its cache", "training"],
)
def test_nothing_is_beyond_one_copy_of(text: str) -> None:
    assert "beyond that" not in why(text, model="llava-1.5-7b")
    assert "beyond that" not in " ".join(explain_file("case3_llava_l4").why)


def test_a_placed_model_that_is_moved_is_named_by_its_line() -> None:
    found = explain_file("case5_cogvlm_demo")
    assert found.why[0].startswith('device_map="auto" ')
    assert "`model = model.to(device)`" in found.why[0]
    assert "the model is placed" in {one.tells for one in found.evidence}


def test_cards_that_are_enough_are_not_asked_to_be_more() -> None:
    found = explain_file("case5_cogvlm_demo")
    assert some(found.would_work).fits
    assert not any("more cards" in change for change in found.changes)
    assert found.changes[0] == text_of("split")
