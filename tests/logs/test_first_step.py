"""No first step goes against the plan, the list or the log beside it."""

from __future__ import annotations

from typing import Final

import pytest

from tests.logs.conftest import LOGS, against, explain, message
from tests.logs.test_account import torch_log
from tests.logs.test_causes import EXAMPLES
from tests.sweep import sweep

#: Runs whose account is held: on some of these cards the model fits, on some it does not.
ACCOUNTS: Final = [
    ("internvl2-8b", "4xrtx3090"), ("internvl2-26b-awq", "1xrtx3090"),
    ("llava-1.5-7b", "1xl4:used=15GiB"), ("internvl2-8b", "1xrtx3060"),
    ("qwen2-vl-7b", "1xv100-32g"), ("cogvlm-17b", "2xrtx3090"), ("qwen3-30b-a3b-awq", "1xrtx4080"),
]  # fmt: skip
#: So many are asked in each check, the others before a release.
_FEW: Final = 3
HELD: Final = [
    *ACCOUNTS[:_FEW], *(pytest.param(*run, marks=pytest.mark.exhaustive) for run in ACCOUNTS[_FEW:])
]  # fmt: skip
SHORT: Final = [
    "[TM][FATAL][1120.09:18:10.597172][allocator.cc:49] CUDA error: out of memory",
    "[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/allocator.h:231",
    "[TM][INFO] [BlockManager] block_size = 2 MB\n"
    "[TM][INFO] [BlockManager] max_block_count = 1112\n"
    "[TM][ERROR] CUDA runtime error: out of memory /lmdeploy/src/turbomind/utils/allocator.h:231",
    "terminate called after throwing an instance of 'std::runtime_error'\n"
    "  what():  [TM][ERROR] CUDA runtime error: out of memory /lmdeploy/core/allocator.cc:49",
    "RuntimeError: No enough gpu memory for kv cache.",
    torch_log().partition("\n")[2],
]  # fmt: skip

OPTIONS: Final = ("", " --tp 2", " --cache-max-entry-count 0.3", " --backend pytorch")


@pytest.mark.parametrize("text", [text for _, text in EXAMPLES])
def test_of_a_row(text: str) -> None:
    assert against(explain(f"$ lmdeploy serve api_server internvl2-8b\n{text}\n"), text) == ""


@pytest.mark.parametrize(("model", "on"), HELD, ids=str)
def test_of_every_row_beside_an_account(model: str, on: str) -> None:
    """Once for a kind of message: its first example, under a model on cards.

    In the check each kind meets one of the few accounts, before a release all of them.
    """
    kinds = list(dict(reversed(EXAMPLES)).items())
    turn = ACCOUNTS.index((model, on))
    for kind, text in sweep(kinds[turn:] + kinds[:turn], _FEW):
        log = f"$ lmdeploy serve api_server {model}\n{text}\n"
        assert (kind, against(explain(log, on=on), log)) == (kind, "")


@pytest.mark.parametrize(("model", "on"), HELD, ids=str)
@pytest.mark.parametrize("text", SHORT)
def test_of_a_lack_of_memory(model: str, on: str, text: str) -> None:
    """Each account meets each text, under one of the options in turn."""
    turn = (len(model + on) + SHORT.index(text)) % len(OPTIONS)
    log = f"$ lmdeploy serve api_server {model}{OPTIONS[turn]}\n{text}\n"
    found = explain(log, on=on)
    assert against(found, log) == ""
    assert message(found) in ("out_of_memory", "no_kv_memory")


@pytest.mark.parametrize("path", sorted(LOGS.glob("*.log")), ids=lambda path: path.stem)
def test_of_a_story(path) -> None:
    text = path.read_text()
    assert against(explain(text), text) == ""


def test_no_step_sets_a_variable_that_the_run_had_set_so() -> None:
    died = "lmdeploy serve api_server m\nWatchdog caught collective operation timeout: Work\n"
    assert "NCCL_P2P_DISABLE=1" in explain(f"$ {died}").first
    assert "NCCL_P2P_DISABLE=1" not in explain(f"$ NCCL_P2P_DISABLE=1 {died}").first
    assert "NCCL_P2P_DISABLE=1" in explain(f"$ NCCL_P2P_DISABLE=0 {died}").first
