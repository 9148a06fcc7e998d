"""What is kept of prepared images: which, how much, and that nobody can change it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from turbofit.serving.images.cache import ImageCache, byte_size, cached

KIB = 1024


def image(source: str | None) -> SimpleNamespace:
    return SimpleNamespace() if source is None else SimpleNamespace(turbofit_source=source)


@pytest.fixture
def prepared():
    """A processor that makes a KiB of each image, and what it was asked."""
    asked = []

    def prepare(images, size=0):
        asked.append((images, size))
        if size < 0:
            raise ValueError(size)
        return {"pixel_values": np.full(KIB, len(asked), np.uint8), "patches": [1, 2]}

    return prepare, asked


def test_the_same_bytes_with_the_same_options_are_prepared_once(prepared):
    prepare, asked = prepared
    once = cached(prepare, ImageCache(10 * KIB))
    first = once(image("a"), size=1)
    assert once(image("a"), size=1)["pixel_values"][0] == first["pixel_values"][0] == 1
    assert len(asked) == 1
    others = (
        (image("a"), 2), (image("b"), 1), ([image("a")] * 2, 1), ([image("a")], 1),
        ([[image("a")]] * 2, 1),
    )  # fmt: skip
    for images, size in others:
        assert once(images, size=size)["pixel_values"][0] == len(asked)
    assert len(asked) == 6


def test_an_image_without_a_name_and_an_error_are_not_kept(prepared):
    prepare, asked = prepared
    cache = ImageCache(10 * KIB)
    once = cached(prepare, cache)
    for images in (image(None), [image("a"), image(None)]):
        once(images)
        once(images)
    for _ in range(2):
        with pytest.raises(ValueError, match="-1"):
            once(image("a"), size=-1)
    assert (len(asked), cache.held) == (6, 0)


def test_nobody_can_change_what_another_gets(prepared):
    prepare, _ = prepared
    once = cached(prepare, ImageCache(10 * KIB))
    for _ in range(3):
        found = once(image("a"))
        assert found["pixel_values"].tolist() == [1] * KIB
        assert found.keys() == {"pixel_values", "patches"}
        found["pixel_values"][:] = 9
        found["patches"].clear()
        found["token"] = 3


def test_the_least_recently_used_goes_first_and_the_bound_holds(prepared):
    prepare, asked = prepared
    cache = ImageCache(3 * KIB + 10)
    once = cached(prepare, cache)
    for name in "abcadabce":
        once(image(name))
        assert cache.held <= cache.most
    # a, b, c; a again; d for b; a; b for c; c for d; e for a.
    assert ["abcde"["abcde".index(i[0].turbofit_source)] for i in asked] == list("abcdbce")
    once(image("a"))
    assert len(asked) == 8
    assert (cache.held, byte_size({"x": [np.zeros(5), (np.zeros(1),)]})) == (3 * KIB, 48)


def test_what_is_larger_than_the_whole_is_not_kept(prepared):
    prepare, asked = prepared
    once = cached(prepare, ImageCache(KIB - 1))
    once(image("a"))
    once(image("a"))
    assert len(asked) == 2
