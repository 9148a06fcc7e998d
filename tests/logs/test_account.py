"""Phases and figures by the account: deaths whose phase is known, and what would have lived."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import yaml

from tests.logs.conftest import against, explain, explain_file, some
from turbofit.core.units import GIB, MIB
from turbofit.logs.answer import Diagnosis
from turbofit.logs.causes import text_of
from turbofit.planning.plan import predict
from turbofit.planning.request import PredictRequest

DEATHS: Final[dict[str, list[str]]] = yaml.decode(
    (Path(__file__).with_name("deaths.yaml")).read_bytes()
)
#: Our users' logs, by the phase that their lines or figures show.
STORIES: Final = {
    "case1_internvl_torchrun": "vision", "case1_internvl_vision_text": "vision",
    "case3_llava_l4": "text", "case4_qwen_v100": "vision", "case5_cogvlm_demo": "weights",
}  # fmt: skip
#: A death under InternVL2-8B without a line before torch's own; the card is told by its memory.
TORCH: Final = (
    "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4{options}  # lmdeploy=={version}\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total"
    " capacity of 23.69 GiB of which {free} MiB is free. Including non-PyTorch memory, this process"
    " has {held} GiB memory in use. Of the allocated memory {torch} GiB is allocated by PyTorch,"
    " and 60.00 MiB is reserved by PyTorch but unallocated.\n"
)
FULL: Final = {"asked": "1.20", "free": "556.00", "held": "23.13", "torch": "1.15"}


def torch_log(version: str = "0.6.4", options: str = "", **figures: str) -> str:
    return TORCH.format(version=version, options=options, **(FULL | figures))


@cache
def explained(name: str) -> Diagnosis:
    on, _, log = DEATHS[name]
    return explain(log, on=on or None)


@pytest.mark.parametrize("name", DEATHS)
def test_the_phase_of_a_death_is_known_and_its_first_step_goes_against_nothing(name: str) -> None:
    _, phase, log = DEATHS[name]
    found = explained(name)
    assert (found.kind, found.phase) == (
        "start_hang" if phase == "start-up hang" else "out_of_memory",
        phase,
    )
    assert against(found, log) == ""


@pytest.mark.parametrize("name", STORIES)
def test_the_phase_of_a_user_s_log_is_known(name: str) -> None:
    assert explain_file(name).phase == STORIES[name]


@pytest.mark.parametrize("version", ["0.5.3", "0.6.0", "0.6.4", "0.7.3", "0.9.2", "0.12.0"])
def test_what_torch_has_not_is_the_cache_and_so_it_was_an_image(version: str) -> None:
    """TurboMind allocates outside torch: weights, a context, and the rest is its cache."""
    found = explain(torch_log(version))
    assert (found.kind, found.phase) == ("out_of_memory", "vision")
    assert any("the KV cache with" in why for why in found.why)
    assert some(found.missing).bytes == int(1.20 * GIB) - 556 * MIB
    assert found.first.startswith("--cache-max-entry-count 0.")


@pytest.mark.parametrize("version", ["0.5.3", "0.6.4", "0.9.2"])
def test_where_nothing_is_left_for_a_cache_it_was_loading(version: str) -> None:
    found = explain(torch_log(version, held="4.20", torch="1.20", free="100.00"))
    assert found.phase == "weights"


@pytest.mark.parametrize("held", ["40.00", "31.00"])
def test_figures_that_contradict_each_other_tell_no_phase(held: str) -> None:
    found = explain(torch_log(held=held).replace("23.69", held).replace(" 556.00", " 9556.00"))
    contradicting = any("contradict each other" in one for one in found.unknown)
    assert (found.phase, contradicting) == ("unknown", True)


@pytest.mark.parametrize("name", [name for name in DEATHS if "turbomind" in name])
def test_the_first_step_is_lived_by_the_same_account(name: str) -> None:
    """`predict` of the settings beside the answer agrees, and of one hundredth more does not.

    Where the account would allow more, the share is the next below the one that died.
    """
    on, phase, log = DEATHS[name]
    found = explained(name)
    if not found.first.startswith("--cache-max-entry-count"):
        assert phase in ("weights", "start-up hang")
        return
    advice = some(found.would_work)
    ratio = float(found.first.split()[1])
    assert advice.fits
    assert advice.settings["cache_max_entry_count"] == ratio
    asked: dict[str, Any] = {**found.read.settings, "tp": advice.settings["tp"]}
    asked |= {"model": found.read.model, "on": on, "lmdeploy": "0.18.0"}
    asked |= {"engine": advice.settings["engine"], "session_len": advice.settings["session_len"]}
    if free := re.search(r"from free ([\d.]+) MB", log):  # the log's own figure decides
        asked["free_at_cache"] = round(float(free[1]) * MIB)
    assert predict(PredictRequest.of(**asked | {"cache_max_entry_count": ratio})).fits
    more = predict(PredictRequest.of(**asked | {"cache_max_entry_count": ratio + 0.01}))
    died = float(str(found.read.settings["cache_max_entry_count"]))
    assert ratio <= max(died - 0.1, 0.75 * died)
    assert not more.fits or ratio == pytest.approx(max(died - 0.1, 0.75 * died))


def test_blocks_tell_the_degree_and_so_nobody_else_is_blamed() -> None:
    """A block of 2 MB is one of tp 4 where a card alone has 8."""
    blocks = (
        "[TM][INFO] [BlockManager] block_size = 2 MB\n[TM][INFO] [BlockManager] max_block_count"
    )
    log = (
        "lmdeploy==0.6.4\n>>> pipeline('OpenGVLab/InternVL2-8B')  # 4x RTX 3090\n"
        f"{blocks} = 7500\n[TM][ERROR] CUDA runtime error: out of memory /t/utils/allocator.h:231\n"
    )
    found = explain(log)
    assert found.read.tp == 4
    assert not any("not empty" in why for why in found.why)


def test_only_the_cards_that_the_run_saw_are_counted() -> None:
    log = torch_log().replace("--tp 4", "--tp 1").replace("$ ", "$ CUDA_VISIBLE_DEVICES=0 ")
    assert explain(f"{log}4x RTX 3090\n").read.machine == "1xrtx3090"


#: A death of which torch names what it asked and what was free, and not who held the card.
BARE = (
    "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4  # 4x RTX 3090, lmdeploy==0.6.4\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked} GiB. GPU 0 has a total"
    " capacity of 23.69 GiB of which 556.00 MiB is free.\n"
)


@pytest.mark.parametrize("asked", ["1.20", "3.50"])
def test_a_change_frees_what_was_missing_by_the_same_account(asked: str) -> None:
    """Else one hundredth less of a ratio that lives by the account would be advised."""
    found = explain(BARE.format(asked=asked))
    assert any("these settings leave room" in one for one in found.unknown)
    share = re.search(r"--cache-max-entry-count (0\.\d+)", found.first)
    assert share is not None
    asks = {"model": "internvl2-8b", "on": "4xrtx3090", "tp": 4, "lmdeploy": "0.6.4"}
    peaks = [
        max(gpu.peak for gpu in predict(PredictRequest.of(**asks, cache_max_entry_count=n)).ledgers)
        for n in (0.8, float(share[1]))
    ]
    assert peaks[0] - peaks[1] >= (some(found.missing).bytes or 0) > 600 * MIB


OCCUPIED = (
    "GPU 0,1,2,3: NVIDIA GeForce RTX 3090\n"
    "[TM][INFO] [BlockManager] block_size = 2 MB\n"
    "[TM][INFO] [BlockManager] max_block_count = 1112\n"
    "[TM][ERROR] CUDA runtime error: out of memory /t/utils/allocator.h:231\n"
)


@pytest.mark.parametrize("degree", [" --tp 4", ""])
def test_cards_that_others_hold_are_freed_first_and_the_degree_is_kept(degree: str) -> None:
    found = explain(f"$ lmdeploy serve api_server OpenGVLab/InternVL2-8B{degree}\n" + OCCUPIED)
    assert found.first.startswith(text_of("free cards"))
    assert any("were not empty" in why for why in found.why)
    advice = some(found.would_work)
    assert advice.settings["tp"] == 4
    assert "for LMDeploy 0.12, a guess: " in advice.note
    assert any("0.12 is a guess" in one for one in found.unknown)


def test_a_degree_that_is_not_kept_is_said_and_so_are_several_processes() -> None:
    check = "[TM][FATAL][1120.09:18:10.597172][x.cc:49] Check failed: x == y\n"
    command = "$ lmdeploy serve api_server {}  # {} RTX 3090, lmdeploy=={}\n"
    found = explain(command.format("OpenGVLab/InternVL2-8B --tp 3", "4x", "0.18.0") + check)
    assert "--tp 3 is not kept: " in some(found.would_work).note
    found = explain(command.format("OpenGVLab/InternVL2-8B", "4x", "0.9.2") + check)
    assert "4 of these" in some(found.would_work).note
