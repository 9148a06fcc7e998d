"""A model that one program held more than once: by its loads, its traceback, or its figures."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain, explain_file, some

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
    assert "LLaVA-1.5-7B has 13.2 GiB of weights" in told
    assert "5.3 GiB of what this process held are beyond that" in told
    assert "a notebook cell that ran twice (a copy is 13.2 GiB)" in told
    assert "another process" not in told
    # Where torch does not say what it allocated, the figure may be of several processes.
    told = why(HELD.format(total="22.17", held="22.15"), model="llava-1.5-7b")
    assert "another process of the card is counted in" in told
    # On a card of twice its size the weights may be there in 32 bits.
    text = ALLOCATED.format(total="44.34", held="44.30", allocated="40.00")
    assert "loaded in 32 bits" in why(text, model="llava-1.5-7b")


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


SHARDS = "Loading checkpoint shards: 100%|##########| 8/8 [00:40<00:00,  5.05s/it]\n"
SECOND = (
    "Traceback (most recent call last):\n"
    '  File "/w/demo.py", line 88, in start\n'
    "    model = {maker}.from_pretrained(path)\n"
)


@pytest.mark.parametrize(
    ("maker", "told"), [("AutoModelForCausalLM", True), ("CLIPVisionModel", False)]
)
def test_a_second_load_of_a_whole_model_stands_in_the_traceback(maker: str, told: bool) -> None:
    text = SHARDS + SECOND.format(maker=maker) + HELD.format(total="23.69", held="23.60")
    assert ("loads another into the same memory" in why(text)) is told


def test_a_placed_model_that_is_moved_is_named_by_its_line() -> None:
    found = explain_file("case5_cogvlm_demo")
    assert found.why[0].startswith('device_map="auto" had placed the model over the cards, and')
    assert "`model = model.to(device)` moves the whole of it onto one" in found.why[0]
    assert "the model is placed" in {one.tells for one in found.evidence}


def test_cards_that_are_enough_are_not_asked_to_be_more() -> None:
    found = explain_file("case5_cogvlm_demo")
    assert some(found.would_work).fits
    assert not any("more cards" in change for change in found.changes)
    assert found.changes[0].startswith("load the model once, and let it be split over the cards")
