"""After a death for lack of memory no step and no plan has a larger share of the cache."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from tests.logs.conftest import explain, some
from tests.sweep import sweep
from turbofit.logs.causes import text_of
from turbofit.planning.plan import predict
from turbofit.planning.request import PredictRequest
from turbofit.report.painters.terminal import paint
from turbofit.report.views.findings_view import diagnosis_view

if TYPE_CHECKING:
    from turbofit.logs.answer import Diagnosis

MODELS: Final = {
    "internvl3-8b": "OpenGVLab/InternVL3-8B",
    "internvl2-2b": "OpenGVLab/InternVL2-2B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
}
CARDS: Final = {"1xrtx4090": "NVIDIA GeForce RTX 4090", "1xa100-80g": "NVIDIA A100-SXM4-80GB"}
RELEASES: Final = ("0.9.2", "0.12.0", "0.18.0")
#: The share that was given; None for the default of 0.8.
SHARES: Final = (None, 0.01, 0.05, 0.12, 0.2, 0.9)
UP: Final = "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n"
LOADS: Final = "Convert to turbomind format:  41%|####1     | 13/32 [00:07<00:10,  1.80it/s]\n"
DIES: Final = (
    "terminate called after throwing an instance of 'std::runtime_error'\n"
    "  what():  [TM][ERROR] CUDA runtime error: out of memory /lmdeploy/core/allocator.cc:49\n"
    "Aborted (core dumped)\n"
)
#: Lines before the death: of a server, of a load, none, and a cache of too few or too many bytes.
PHASES: Final = {
    "serving": UP,
    "weights": LOADS,
    "unknown": "",
    "contradiction": "[TM][INFO][1120.09:18:18.1][engine.cc:1] Object cache budget: 300.00 MB from"
    " free 375.00 MB and ratio 0.80\n",
}
_SHARE: Final = r"cache[-_]max[-_]entry[-_]count[ =]([\d.]+)"


def log_of(model: str, on: str, release: str, share: float | None, phase: str = "serving") -> str:
    option = "" if share is None else f" --cache-max-entry-count {share}"
    command = f"lmdeploy serve api_server {MODELS[model]} --server-port 23333{option}\n"
    return f"{command}GPU 0: {CARDS[on]}\nLMDeploy: {release}\n{PHASES[phase]}{DIES}"


@cache
def lives(model: str, on: str, release: str, share: float) -> bool:
    asked = {"model": model, "on": on, "lmdeploy": release, "engine": "turbomind"}
    request = PredictRequest.of(**asked, cache_max_entry_count=share)
    return predict(request, finds_remedies=False).fits


def shown(found: Diagnosis) -> list[str]:
    """The lines of a terminal of 100 columns."""
    return paint(diagnosis_view(found), width=100).splitlines()


def next_share(died: float) -> float:
    return max(round(max(died - 0.1, 0.75 * died), 4), 0.1)


@pytest.mark.parametrize(("model", "on", "release"), sweep(product(MODELS, CARDS, RELEASES), 5))
def test_no_share_is_raised_or_lowered_in_vain(model: str, on: str, release: str) -> None:
    for share, phase in product(SHARES, PHASES):
        found = explain(log_of(model, on, release, share, phase))
        died, lines = share or 0.8, shown(found)
        lighter = found.would_work is not None and found.would_work.in_place_of
        raised = [n for n in re.findall(_SHARE, " ".join(lines)) if float(n) > died]
        assert lighter or raised == []
        steps = [float(n) for step in found.changes for n in re.findall(_SHARE, step)]
        assert [n for n in steps if n < 0.1 or n == died] == []
        if died <= 0.1 or phase in ("weights", "contradiction"):
            assert steps == []
            continue
        lower = [n / 100 for n in range(round(died * 100) - 1, 9, -1)]
        own = next_share(died)
        best = own if lives(model, on, release, own) else None
        if best is None and not any(lives(model, on, release, n) for n in lower):
            continue
        head = " ".join(lines[:20])
        told = [float(n) for n in re.findall(r"--cache-max-entry-count ([\d.]+)", head)]
        assert told
        assert told[0] == (best or told[0])
        assert lives(model, on, release, told[0])
        assert some(found.would_work).command.split()[-1] in head


@pytest.mark.parametrize(
    ("model", "card", "lighter"),
    [("OpenGVLab/InternVL2-26B", "NVIDIA GeForce RTX 3090", "InternVL2-26B-AWQ"),
     ("OpenGVLab/InternVL3-14B", "NVIDIA GeForce RTX 4080", "InternVL3-14B-AWQ"),
     ("Qwen/Qwen2.5-VL-32B-Instruct-AWQ", "NVIDIA GeForce RTX 4080", "Qwen2.5-VL-7B-Instruct-AWQ")],
)  # fmt: skip
def test_a_lighter_checkpoint_that_fits_has_its_line(model: str, card: str, lighter: str) -> None:
    found = explain(f"lmdeploy serve api_server {model}\nLMDeploy: 0.18.0\nGPU 0: {card}\n{DIES}")
    advice = some(found.would_work)
    assert (advice.model, advice.fits) == (lighter, True)
    assert found.first.startswith(lighter)
    head = " ".join(shown(found)[:20])
    assert f"/{lighter} " in head
    assert advice.command.split()[-1] in head


@pytest.mark.parametrize("phase", ["weights", "contradiction"])
def test_nothing_serves_that_the_log_contradicts(phase: str) -> None:
    found = explain(log_of("internvl3-8b", "1xrtx4090", "0.18.0", 0.8, phase))
    if phase == "weights":
        assert found.phase == "weights"
        return
    assert "375 MiB" in found.what
    assert found.changes[0] == text_of("contradicted")
    assert found.would_work is None
    assert "--model" in found.first


def test_a_forecast_below_nothing_is_told_before_all_else() -> None:
    found = explain(
        "$ lmdeploy serve api_server OpenGVLab/InternVL2-26B --tp 2\n"
        "GPU 0,1: NVIDIA GeForce RTX 3090\n[TM][INFO][1120.09:18:18.1][engine.cc:128] Object cache"
        " budget: 3000.00 MB from free 3750.00 MB and ratio 0.80\n" + TORCH
    )
    assert found.changes[0] == text_of("contradicted")
    assert found.would_work is None
    assert not any(re.search(_SHARE, step) for step in found.changes)


@pytest.mark.parametrize("card", ["NVIDIA GeForce RTX 3060 Laptop GPU", "NVIDIA GeForce RTX 3060"])
def test_weights_that_leave_nothing_of_the_card_come_first(card: str) -> None:
    found = explain(
        "pipe = pipeline('OpenGVLab/InternVL3-14B-AWQ', cache_max_entry_count=0.5)\n"
        f"GPU 0: {card}\n{DIES}"
    )
    assert found.phase == "weights"
    assert not any(re.search(_SHARE, step) for step in found.changes)


def test_settings_that_fit_an_empty_card_are_said_to_and_the_card_is_looked_at_first() -> None:
    found = explain(log_of("internvl3-8b", "1xa100-80g", "0.18.0", 0.6))
    assert found.first.startswith(text_of("look first"))
    assert found.first.endswith("; then --cache-max-entry-count 0.5")
    advice = some(found.would_work)
    assert advice.fits is None  # nothing is said to have worked
    assert advice.verdict.startswith("once ")
    assert advice.command.startswith("turbofit serve OpenGVLab/InternVL3-8B ")
    assert any("TM_LOG_LEVEL=INFO" in one for one in found.send)


def test_a_release_that_serve_does_not_launch_has_its_own_line() -> None:
    found = explain(log_of("qwen2.5-7b", "1xrtx4090", "0.9.2", None))
    assert some(found.would_work).command.startswith("lmdeploy serve api_server Qwen/Qwen2.5-7B")


def test_beside_a_tiny_share_the_forward_is_made_smaller() -> None:
    """No lower share is named, and none is raised."""
    found = explain(log_of("internvl3-8b", "1xrtx4090", "0.18.0", 0.05))
    told = some(re.fullmatch(r"--max-prefill-token-num (\d+)", found.first))
    asked = {"model": "internvl3-8b", "on": "1xrtx4090", "max_prefill_token_num": int(told[1])}
    request = PredictRequest.of(**asked, cache_max_entry_count=0.05)
    assert predict(request, finds_remedies=False).fits


def test_smaller_images_come_with_the_share_and_name_the_engine() -> None:
    """No share of TurboMind's cache lives beside the largest image of a client."""
    found = explain(
        "lmdeploy serve api_server /data/Qwen2.5-VL-7B-Instruct --server-port 23333\n"
        f"GPU 0: NVIDIA A10\nLMDeploy: 0.10.1\n{DIES}"
    )
    step = r"--max-pixels (\d+) for every image, with --cache-max-entry-count ([\d.]+)"
    told = some(re.match(step, found.first))
    settings = some(found.would_work).settings
    assert (settings["engine"], settings["max_pixels_per_image"]) == ("turbomind", int(told[1]))
    assert float(told[2]) <= next_share(0.8)
    assert "keeps images to max_pixels" in some(found.would_work).note


def test_a_plan_of_another_engine_names_it_and_all_that_it_depends_on() -> None:
    """LMDeploy 0.6.4 runs this model on its PyTorch engine alone."""
    log = log_of("qwen2-vl-2b", "1xrtx4090", "0.6.4", None)
    found = explain(log.replace(DIES, TORCH.partition("forward(inputs)\n")[2]))
    assert ": --backend pytorch --tp 1 --cache-max-" in found.first
    for option in ("--max-prefill-token-num", "--max-batch-size", "--session-len", "--max-pixels"):
        assert f" {option} " in found.first


@pytest.mark.parametrize("what", ["kv cache", "runtime"])
def test_a_cache_that_could_not_be_sized_is_not_cured_by_a_lower_share(what: str) -> None:
    error = f"RuntimeError: No enough gpu memory for {what}.\n"
    command = "lmdeploy serve api_server Qwen/Qwen2.5-VL-7B-Instruct --backend pytorch\n"
    for log in (error, f"{command}GPU 0: NVIDIA A10\nLMDeploy: 0.9.2\n{error}"):
        found = explain(log)
        assert "--max-batch-size" in found.first
        assert not any(step.startswith("--cache-max-entry-count") for step in found.changes)
        assert found.missing is None


def test_before_the_cache_no_share_is_named() -> None:
    start = "[TM][WARN][1120.09:18:18.1][turbomind.cc:128] `max_context_token_num` is not set\n"
    fatal = "[TM][FATAL][1120.09:18:19.1][allocator.cc:49] CUDA error: out of memory\n"
    found = explain(f"lmdeploy serve api_server internvl3-8b\n{start}{fatal}", on="1xrtx3060")
    assert found.phase == "weights"
    assert not any("cache-max-entry-count" in step for step in found.changes)


TORCH: Final = (
    '  File "/venv/lmdeploy/vl/engine.py", line 171, in forward\n    self.model.forward(inputs)\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has a total"
    " capacity of 23.69 GiB of which 556.00 MiB is free.\n"
)


def test_the_number_follows_from_the_figures_without_a_model() -> None:
    """0.8 left a fifth of 2.7 GiB; 673 MiB more are a quarter of them."""
    assert explain(TORCH).first.startswith("--cache-max-entry-count 0.55: with 0.8, the default,")


def test_cards_that_the_first_step_frees_are_planned_for_as_free() -> None:
    found = explain(
        "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4\n"
        "GPU 0,1,2,3: NVIDIA GeForce RTX 3090\n[TM][INFO] [BlockManager] block_size = 2 MB\n"
        "[TM][INFO] [BlockManager] max_block_count = 1112\n"
        "[TM][ERROR] CUDA runtime error: out of memory /t/utils/allocator.h:231\n"
    )
    assert found.first.startswith("free the cards first")
    assert found.first.endswith("; then --cache-max-entry-count 0.7")
    assert some(found.would_work).verdict.startswith("once ")


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_no_remedy_takes_the_bound_away(share: float) -> None:
    """Not even as "leave the option to turbofit", which would choose a larger share."""
    option = f"--cache-max-entry-count {share}"
    for model, on in (("cogvlm-17b", "2xrtx3090"), ("internvl2-26b-awq", "1xrtx3090")):
        found = explain(f"$ lmdeploy serve api_server {model} {option}\n{DIES}", on=on)
        remedies = some(found.would_work).remedies
        assert not any("leave --cache-max-entry-count" in one.change for one in remedies)
        assert not any("leave --cache-max-entry-count" in step for step in found.changes)
