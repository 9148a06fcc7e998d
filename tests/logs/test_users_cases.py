"""Our users' five cases (logs written anew from their facts) and the right answer to each."""

from __future__ import annotations

import pytest

from tests.logs.conftest import LOGS, explain_file, message, some
from turbofit.core.units import GIB, MIB
from turbofit.logs.answer import Diagnosis


def told(found: Diagnosis) -> str:
    """All that is said, in one string."""
    return " ".join((found.what, *found.why, *found.changes))


@pytest.mark.parametrize("path", sorted(LOGS.glob("*.log")), ids=lambda path: path.stem)
def test_every_answer_names_the_lines_it_rests_on(path) -> None:
    found = explain_file(path.stem)
    lines = path.read_text().splitlines()
    assert found.evidence
    for one in found.evidence:
        assert one.text[:40].strip() in lines[one.line - 1]
        assert one.tells
    assert [one.line for one in found.evidence] == sorted(one.line for one in found.evidence)


def test_1_internvl_on_four_3090_under_torchrun() -> None:
    found = explain_file("case1_internvl_torchrun")
    assert (found.kind, found.phase) == ("out_of_memory", "vision")
    for words in (
        # 1112 blocks of 2 MB are 80 % of what was free; the rest is what images had.
        "556 MiB stayed",
        # Tensor parallel weights of 24 GB cards do not explain that only 2.7 GiB were free.
        "the cards were not empty",
        "ratio 0.8, if nobody set another",
        "4 models in the place of one",
        "the peer access warning is not the cause",
        "not under torchrun",
    ):
        assert words in told(found)
    assert some(found.missing).bytes is None
    held = {one.who: one.bytes for one in found.held}
    assert held["the KV cache"] == 2224 * MIB
    assert held["others, or copies of this engine"] > 15 * GIB
    advice = some(found.would_work)
    assert advice.fits
    assert (advice.on, advice.settings["communicator"]) == ("4xrtx3090,p2p=none", "nccl")
    assert (found.read.model, found.read.tp, found.read.version) == ("InternVL2-8B", 4, None)


def test_1_the_same_where_torch_says_what_was_asked() -> None:
    found = explain_file("case1_internvl_vision_text")
    assert (found.kind, found.phase) == ("out_of_memory", "vision")
    assert some(found.missing).basis == "log"
    assert some(found.missing).bytes == int(1.20 * GIB) - 556 * MIB
    assert {one.who for one in found.held} >= {"this process", "process 4101", "process 4102"}
    assert "whole matrix" in told(found)


def test_1_the_plan_is_of_the_release_whose_lines_these_are() -> None:
    advice = some(explain_file("case1_internvl_torchrun").would_work)
    assert advice.command.startswith("lmdeploy serve api_server OpenGVLab/InternVL2-8B ")
    guess = "for LMDeploy 0.7, a guess: LMDeploy prints its warning of peer access up to 0.7.3"
    assert guess in advice.note


def test_2_llava_lora_with_an_offload_error() -> None:
    found = explain_file("case2_llava_lora_offload")
    assert (found.kind, found.phase) == ("offload", "weights")
    assert "layers.22" in found.why[0]
    assert "too little free memory" in told(found)
    for words in ("turbofit doctor", "turbofit merge BASE ADAPTER OUT", "turbofit plan OUT"):
        assert any(words in change for change in found.changes)
    assert "GPUs were visible" in " ".join(found.unknown)
    advice = some(found.would_work)
    assert advice.model == "LLaVA-1.5-7B"
    assert advice.fits
    assert advice.settings["engine"] == "pytorch"
    assert advice.command == ("turbofit serve llava-hf/llava-1.5-7b-hf --images 1 --context 4096")


def test_3_llava_on_a_shared_l4() -> None:
    found = explain_file("case3_llava_l4")
    assert (found.kind, found.phase) == ("out_of_memory", "text")
    assert some(found.missing).bytes == 14 * MIB - int(8.88 * MIB)
    held = {one.who: one.bytes for one in found.held}
    # Torch calls itself by pid here: the process that holds what torch allocated.
    this = "this process (process 51222 of the text)"
    assert held == {this: round(14.25 * GIB), "process 28410": int(7.91 * GIB)}
    assert any("(process 28410)" in one for one in found.changes)
    assert any("expandable_segments" in one for one in found.changes)
    assert some(found.would_work).fits
    assert "cards are free" in some(found.would_work).verdict
    assert found.read.machine == "1xl4"


def test_4_qwen2_vl_on_a_v100() -> None:
    found = explain_file("case4_qwen_v100")
    assert (found.kind, found.phase) == ("out_of_memory", "vision")
    assert some(found.missing).bytes == pytest.approx((21.87 - 14.31) * GIB, abs=2)
    assert "whole matrix" in told(found)
    advice = some(found.would_work)
    assert advice.fits
    assert (advice.settings["dtype"], advice.settings["tp"]) == ("float16", 1)
    assert "max_pixels_per_image" in advice.settings


def test_4_then_two_devices() -> None:
    found = explain_file("case4_qwen_two_devices")
    assert (found.kind, message(found)) == ("unknown", "device_mismatch")
    assert "cuda:0 and cuda:1" in found.what
    assert 'device_map="auto"' in some(found.others).had[0]
    assert found.missing is None
    advice = some(found.would_work)
    assert (advice.settings["tp"], advice.settings["replicas"]) == (1, 2)


def test_5_cogvlm_replicas_and_shards_at_once() -> None:
    found = explain_file("case5_cogvlm_demo")
    assert (found.kind, found.phase) == ("out_of_memory", "weights")
    for words in (
        "loaded the whole model 2 times",
        "replicas and shards at once",
        "load the model once",
    ):
        assert words in told(found)
    advice = some(found.would_work)
    assert advice.fits
    # Sharded once, never replicated: no card holds it whole.
    assert (advice.settings["tp"], advice.settings["replicas"]) == (2, 1)
