"""MiniCPM3 in the PyTorch engine's account, against that engine on pretend GPUs.

Figures in MiB by torch's allocator, of the first layers: live above what stayed afterwards.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import cache_problem, tp_problem
from turbofit.memory.pytorch.activations import Activations, Prefill, activations_of
from turbofit.memory.pytorch.cache import block_bytes
from turbofit.memory.pytorch.weights import largest_loaded, weight_classes
from turbofit.model.source import resolve_model

NAME = "minicpm3-4b"


def smaller(layers: int) -> Model:
    model = resolve_model(NAME)
    return replace(model, text=replace(model.text, layers=layers))


def work(layers: int = 2) -> Activations:
    return activations_of(smaller(layers), Settings(max_batch_size=64), CONSTANTS, ())


@pytest.mark.parametrize(("layers", "mib"), [(4, 836.8), (62, 7770.3)])
def test_weights_are_the_engines(layers: int, mib: float) -> None:
    classes = weight_classes(smaller(layers), 1)
    assert sum(classes.values()) / MIB == pytest.approx(mib, abs=0.05)
    assert "lm_head" not in classes
    assert largest_loaded(smaller(layers), 1) == 73448 * 2560 * 2


def test_each_head_s_keys_and_padded_values_are_cached() -> None:
    text = resolve_model(NAME).text
    assert block_bytes(text, Settings()) == 62 * 64 * 40 * 2 * (64 + 32) * 2
    assert text.cached_latent is None


@pytest.mark.parametrize(
    ("tokens", "context", "seen"),
    [
        (4096, 12_000, 1187.76),  # logits of this forward and of the one before
        (1024, 29_760, 647.62),  # attention of a long prompt, and the logits before
    ],
)
def test_a_prefill_holds_what_the_engine_held(tokens: int, context: int, seen: float) -> None:
    paid = work().prefill(Prefill(tokens=tokens, context=context)) / MIB
    assert seen <= paid <= seen + 4


def test_graphs_end_in_logits() -> None:
    row = 73448 * 2
    assert work().graph_buffers([1, 2, 4, 8]) == 7 * row
    assert work().decode(64) >= 64 * row


def test_what_is_refused() -> None:
    model = resolve_model(NAME)
    assert tp_problem(model, 1) is None
    assert "on several ranks" in (tp_problem(model, 2) or "")
    for policy in (0, 16, 17):
        assert cache_problem(model, Settings(quant_policy=policy)) is None
    for policy in (4, 8, 42):
        assert f"--quant-policy {policy}" in (
            cache_problem(model, Settings(quant_policy=policy)) or ""
        )
