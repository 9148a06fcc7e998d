"""What LMDeploy imports for one model alone."""

from __future__ import annotations

import pytest

from tests.diagnose.doctor.support import Find, Make, two
from turbofit.model.presets import preset_model


@pytest.mark.parametrize(
    ("preset", "speculative", "missing", "state"),
    [
        ("gpt-oss-20b", False, "openai_harmony", "stops"),
        ("qwen3-next-80b-a3b", False, "flash-linear-attention's fla", "stops"),
        ("qwen3.5-4b", False, "flash-linear-attention's fla", "warning"),  # TurboMind needs none
        ("glm-4.5-air", False, "", "ok"),
        ("glm-4.5-air", True, "FlashAttention-3's flash_attn_interface", "stops"),
        ("deepseek-v3", True, "FlashMLA's flash_mla", "stops"),
        ("internvl2-8b", False, "", "ok"),
    ],
)
def test_what_is_missing_and_whether_another_engine_serves(
    find: Find, sources: Make, preset: str, speculative: bool, missing: str, state: str
) -> None:
    places, model = sources(), preset_model(preset)
    found = find("modules", two(), places, model=model, drafts=speculative)
    assert found.state == state
    assert missing in found.seen
    places.modules |= {"openai_harmony", "fla", "tilelang", "flash_attn_interface", "flash_mla"}
    assert find("modules", two(), places, model=model, drafts=speculative).state == "ok"


def test_of_another_interpreter_nothing_is_known(find: Find, sources: Make) -> None:
    places = sources()
    del places.packages["lmdeploy"]
    found = find("modules", two(), places, model=preset_model("gpt-oss-20b"))
    assert found.state == "unreadable"
