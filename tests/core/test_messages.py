"""Nouns after numbers, and sets of GPUs."""

from __future__ import annotations

from turbofit.core.messages import groups_of, indices, on_each_gpu, plural


def test_a_noun_after_a_number() -> None:
    assert [plural(n, "patch") for n in (0, 1, 2)] == ["patches", "patch", "patches"]
    assert [plural(n, "tile") for n in (0, 1, 2)] == ["tiles", "tile", "tiles"]


def test_sets_of_gpus() -> None:
    assert indices([3, 0, 1]) == "0-1,3"
    assert groups_of([(0, 1), (2,)]) == "0-1 | 2"


def test_what_several_gpus_have_each_one_has_alone() -> None:
    assert [f"1 GiB free{on_each_gpu(gpus)}" for gpus in (1, 4)] == [
        "1 GiB free", "1 GiB free on each GPU",
    ]  # fmt: skip
