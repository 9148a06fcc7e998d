"""What Qwen3-Omni takes beyond Qwen3-VL, in the PyTorch engine's account."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.core.errors import UsageError
from turbofit.core.units import MIB
from turbofit.memory.engines import engine_for
from turbofit.memory.pytorch.weights import weight_classes
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(("tp", "seen"), [(1, 8212.5), (2, 5127.2)])
def test_weights_are_the_engine_s(tp: int, seen: float) -> None:
    """Four of its layers on pretend RTX 3090s: what the tensors ask for, of one rank."""
    model = resolve_model("qwen3-omni-30b-a3b")
    assert model.text.moe is not None
    text = replace(model.text, layers=4, moe=replace(model.text.moe, layers=4))
    held = sum(weight_classes(replace(model, text=text), tp).values())
    assert held == pytest.approx(seen * MIB, abs=MIB)


def test_the_tower_for_sound_is_held_and_not_read() -> None:
    model = resolve_model("qwen3-omni-30b-a3b")
    assert model.vision is not None
    deaf = replace(model, vision=replace(model.vision, audio=None))
    positions = 1500 * 1280 * 4
    held = weight_classes(model, 1)["audio"]
    more = model.parameters - resolve_model("qwen3-vl-30b-a3b").parameters
    assert held == 2 * (more - 2 * 128 * 2048) + positions
    engine = engine_for(model)
    assert engine.traffic(model, 1) == engine.traffic(deaf, 1)


def test_older_engines_have_no_account_of_it() -> None:
    model = resolve_model("qwen3-omni-30b-a3b")
    with pytest.raises(UsageError, match="audio tower"):
        engine_for(model, version="0.17.0")


def test_the_worst_image_is_never_under() -> None:
    """50,176 patches in one forward: 1,797.0 MiB live on pretend GPUs."""
    plan = api.plan("qwen3-omni-30b-a3b", on="1xa100-80g", engine="pytorch")
    terms = {term.term: term.bytes for term in plan.gpus[0].ledger}
    seen = int(1797.0 * MIB)
    assert plan.limits.units_per_forward == 50_176
    assert seen <= terms["vision_forward"] <= seen + 0.03 * plan.gpus[0].total
    assert not plan.takes_videos
