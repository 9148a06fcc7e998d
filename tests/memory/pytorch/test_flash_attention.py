"""Which cards verify drafts, and with how many parts of long sequences."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.conftest import card
from turbofit.core.draft import Draft
from turbofit.memory.pytorch.activations import needed_modules, splits, without_kernels
from turbofit.model.draft_reader import read_draft
from turbofit.model.source import resolve_model

LLAMA = resolve_model("llama-3.1-8b").text
DENSE = Draft(method="eagle", text=LLAMA, vocab=LLAMA.vocab, embeddings=True)
LATENT = read_draft(resolve_model("glm-4.7-flash"), "deepseek_mtp", None, 1)


@pytest.mark.parametrize(
    ("kv_heads", "processors", "count"),
    [(8, 132, 15), (8, 82, 9), (1, 132, 109), (4, 108, 23), (32, 28, 1), (128, 132, 1)],
)
def test_parts_fill_the_multiprocessors(kv_heads: int, processors: int, count: int) -> None:
    assert splits(kv_heads, processors) == count


@pytest.mark.parametrize(
    ("capability", "dense", "latent"),
    [
        ((7, 5), False, False), ((8, 0), True, False), ((8, 9), True, False),
        ((9, 0), True, True), ((10, 0), False, False), ((12, 0), False, False),
    ],
)  # fmt: skip
def test_cards(capability: tuple[int, int], dense: bool, latent: bool) -> None:
    gpus = [card(), replace(card(1), compute_capability=capability)]
    assert (without_kernels(DENSE, gpus) is None) is dense
    assert (without_kernels(LATENT, gpus[1:]) is None) is latent


def test_packages_are_named_with_their_modules() -> None:
    assert needed_modules(DENSE.text) == ("FlashAttention-3's flash_attn_interface",)
    assert needed_modules(LATENT.text) == ("FlashMLA's flash_mla",)
