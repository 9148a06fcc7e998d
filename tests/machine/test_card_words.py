"""Cards that a text names between other words: how many, which, and of what size."""

from __future__ import annotations

import pytest

from turbofit.machine.card_words import CardWords, as_large
from turbofit.machine.spec import parse_spec


def named(text: str) -> dict[str, int]:
    words = CardWords()
    words.read(1, text)
    return {name: cards.number for name, cards in words.found.items()}


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("在4张NVIDIA RTX 3090(24GB)上部署", {"rtx3090": 4}),
        ("四张 RTX 3090 上", {"rtx3090": 4}),
        ("一张 L4(24 GB)", {"l4": 1}),
        ("两块 A100 80G", {"a100-80g": 2}),
        ("4张3090", {"rtx3090": 4}),
        ("4x3090, tp 4", {"rtx3090": 4}),
        ("4 x 3090", {"rtx3090": 4}),
        ("3090 x 4", {"rtx3090": 4}),
        ("8xA100", {"a100-40g": 8}),
        ("four RTX 3090 of 24 GB", {"rtx3090": 4}),
        # A card of which little is known is named, so that another is not the machine.
        ("RTX 5070 Ti 16303MiB, RTX 5090 D 32607MiB", {"rtx5070ti": 0, "RTX 5090 D": 0}),
        # Figures that are no cards.
        ("shape 8x4096, lr 3090, 2x1080p, step 4070/5090", {}),
        ("progress ████ 3090 of 4090", {}),
    ],
)
def test_a_text_names_cards(text: str, cards: dict[str, int]) -> None:
    assert named(text) == cards


@pytest.mark.parametrize("count", ["4张", "四张", "4块", "4 张 "])
def test_a_count_in_chinese_is_one_of_a_spec_too(count: str) -> None:
    assert parse_spec(f"{count}3090").gpus == parse_spec("4xrtx3090").gpus
    assert named(f"{count}NVIDIA RTX 3090") == {"rtx3090": 4}


def test_a_card_that_printed_its_memory_is_the_one_of_that_size() -> None:
    assert as_large("a100-80g", 42_280 << 20) == "a100-40g"
    assert as_large("rtx3090", 20_000 << 20) == "rtx3090:total=20000MiB"
    assert as_large("rtx3090", 0) == "rtx3090"
