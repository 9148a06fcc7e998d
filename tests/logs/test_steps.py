"""The order of steps: the share with its number, all settings of a plan, nothing in vain."""

from __future__ import annotations

from tests.logs.conftest import explain, some

FATAL = "[TM][ERROR] CUDA runtime error: out of memory /l/src/turbomind/utils/allocator.h:231\n"


def test_general_advice_on_the_share_has_its_number() -> None:
    found = explain("lmdeploy serve api_server /m/moon --cache-max-entry-count 0.5\n" + FATAL)
    assert found.first.startswith("--cache-max-entry-count 0.4: with 0.5 ")
    assert not any("a lower --cache-max-entry-count" in step for step in found.changes)


def test_a_text_model_is_told_nothing_of_images() -> None:
    log = f"lmdeploy serve api_server qwen3-8b\nLMDeploy: 0.6.4\n{FATAL}"  # no such run can be
    assert not any("image" in step for step in explain(log, on="1xrtx4090").changes)


def test_who_held_the_whole_card_is_not_looked_for() -> None:
    """Torch's text shows that nobody else did, so that the account is too low."""
    found = explain(
        "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4  # lmdeploy==0.6.4\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total"
        " capacity of 23.69 GiB of which 556.00 MiB is free. Including non-PyTorch memory, this"
        " process has 23.13 GiB memory in use. Of the allocated memory 1.15 GiB is allocated by"
        " PyTorch, and 60.00 MiB is reserved by PyTorch but unallocated.\n"
    )
    assert found.first.startswith("--cache-max-entry-count 0.7")
    assert found.first.endswith("account is too low here")
    assert some(found.would_work).settings["cache_max_entry_count"] == 0.7
    assert "cards are free" not in some(found.would_work).verdict
