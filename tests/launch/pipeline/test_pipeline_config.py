"""A caller's own config beside a plan, for both of LMDeploy's engines."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit import api
from turbofit.core.errors import UsageError
from turbofit.launch.pipeline.pipeline import (
    engine_of,
    planned_config,
    with_config,
    with_draft,
)

pytestmark = pytest.mark.lmdeploy
lmdeploy: Any = None


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """LMDeploy, which takes seconds: not in each worker that only collects this file."""
    globals()["lmdeploy"] = pytest.importorskip("lmdeploy")


def test_a_config_is_the_word_for_its_engine() -> None:
    assert engine_of(None, "auto") == "auto"
    assert engine_of(lmdeploy.PytorchEngineConfig(), "auto") == "pytorch"
    assert engine_of(lmdeploy.TurbomindEngineConfig(), "turbomind") == "turbomind"


def test_pytorch_fields_are_planned_with_under_their_own_names() -> None:
    backend_config = lmdeploy.PytorchEngineConfig(
        session_len=4096, quant_policy=8, eager_mode=True, block_size=32, download_dir="/x"
    )
    planning = with_config({"on": "1xrtx3090"}, backend_config, "pytorch")
    assert planning["cache_block_seq_len"] == 32
    assert (planning["quant_policy"], planning["eager_mode"]) == (8, True)
    plan = api.plan("qwen2-vl-7b", engine="pytorch", **planning)
    config = planned_config(plan, backend_config)
    assert config is not backend_config
    assert (config.session_len, config.block_size, config.download_dir) == (4096, 32, "/x")
    assert config.cache_max_entry_count == plan.settings.cache_max_entry_count
    assert config.max_batch_size == plan.settings.max_batch_size
    assert backend_config.max_batch_size is None


def test_without_a_config_the_plan_makes_one() -> None:
    plan = api.plan("llava-1.5-7b", on="1xrtx3090")
    config = planned_config(plan, None)
    assert type(config) is lmdeploy.PytorchEngineConfig
    assert config.max_prefill_token_num == plan.settings.max_prefill_token_num


def test_what_drafts_is_planned_with() -> None:
    from lmdeploy.messages import SpeculativeConfig

    config = SpeculativeConfig(method="deepseek_mtp", num_speculative_tokens=2)
    planning = with_draft({"on": "4xa100-80g", "tp": 4}, config)
    draft = api.plan("glm-4.5-air", engine="pytorch", **planning).settings.draft
    assert draft is not None
    assert (draft.method, draft.num_speculative_tokens, draft.model) == ("deepseek_mtp", 2, "")
    assert with_draft({"tp": 1}, None) == {"tp": 1}
    with pytest.raises(UsageError, match="speculative_config is a object"):
        with_draft({}, object())
