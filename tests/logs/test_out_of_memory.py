"""Torch's out-of-memory text: what helps in each program, and who held the card."""

from __future__ import annotations

import re

import pytest

from tests.logs.conftest import explain, some
from tests.logs.test_rules import TRACE, frame
from turbofit.logs.answer import Diagnosis
from turbofit.logs.causes import text_of
from turbofit.logs.death import phase_of
from turbofit.logs.log_events import PythonFrame
from turbofit.machine.source import machine_from
from turbofit.planning.plan import plan, predict
from turbofit.planning.request import PlanRequest, PredictRequest

SITE = "/venv/site-packages/"
SAID = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 8.37 GiB. GPU 0 has a total"
    " capacity of 11.62 GiB of which 7.06 GiB is free. Including non-PyTorch memory, this process"
    " has 4.56 GiB memory in use. Of the allocated memory 2.16 GiB is allocated by PyTorch, and"
    " 20.00 MiB is reserved by PyTorch but unallocated.\n"
)
LMDEPLOY = "/opt/lmdeploy/pytorch"


def test_a_program_of_its_own_is_told_of_what_it_can_change() -> None:
    found = explain(TRACE + frame("transformers/models/x/modeling_x.py", "forward") + SAID)
    assert any("a smaller batch" in one for one in found.changes)
    assert not any("--max-prefill-token-num" in one for one in found.changes)


@pytest.mark.parametrize(
    ("path", "held", "first"),
    [
        ("/content/LLaVA/llava/model/llava_llama.py", "11.55", True),
        ("/content/LLaVA/llava/model/llava_llama.py", "4.56", False),
        ("/srv/LLaVA/llava/model/llava_llama.py", "11.55", False),
    ],
)
def test_a_notebook_whose_process_filled_the_card_is_started_again_first(
    path: str, held: str, first: bool
) -> None:
    said = SAID.replace("4.56", held).replace("8.37 GiB", "14.00 MiB").replace("7.06 GiB", "1 MiB")
    found = explain(f'{TRACE}  File "{path}", line 1, in generate\n{said}')
    assert ("restart the notebook's kernel" in found.changes[0]) is first


WSL = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
    " capacity of 15.92 GiB of which 0 bytes is free. Including non-PyTorch memory, this process"
    " has 17179869184.00 GiB memory in use. Of the allocated memory 14.10 GiB is allocated by"
    " PyTorch, and 4.00 GiB is reserved by PyTorch but unallocated.\n"
)


def test_a_figure_that_cannot_be_is_unknown() -> None:
    found = explain(WSL)
    assert found.held == ()
    assert not any("outside torch" in one for one in found.why)
    assert not any("expandable_segments" in one for one in found.changes)


@pytest.mark.parametrize(
    ("path", "function", "phase", "option"),
    [
        (f"{LMDEPLOY}/engine/agent.py", "build_cache_engine", "cache",
         "--cache-max-entry-count 0.7: with 0.8, the default, it ran out"),
        (f"{LMDEPLOY}/models/gpt_oss.py", "forward", "text", "--max-prefill-token-num"),
        ("/opt/lmdeploy/lite/quantization/calibration.py", "calibrate", "quantising",
         "--calib-seqlen"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "(RayWorker pid=77, ip=10.0.0.2) ", "[E] ",
                                    "2026-01-01 10:00:00,000 [ERROR] "])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_a_program_is_told_of_its_own_options(
    path: str, function: str, phase: str, option: str, prefix: str, first: bool
) -> None:
    """The traceback stands before the message, or after it, behind any prefix."""
    trace = f'{TRACE}  File "{path}", line 3, in {function}\n'
    log = SAID + trace if first else trace + SAID
    found = explain("".join(f"{prefix}{line}\n" for line in log.splitlines()))
    assert (found.kind, found.phase) == ("out_of_memory", phase)
    assert any(option in one for one in found.changes)
    assert not any("cache_max_entry_count" in one for one in found.changes)
    assert "TurboMind" not in " ".join(found.why)
    whole = phase not in ("cache", "quantising")
    assert ("whole matrix" in " ".join(found.why)) == whole


@pytest.mark.parametrize(
    ("phase", "frames"),
    [
        ("vision", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(1, 2))")]),
        ("text", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(2, 3))")]),
        ("warm-up", [("lmdeploy/pytorch/engine/model_agent.py", "warmup", ""),
                     ("lmdeploy/pytorch/models/clip.py", "forward", "")]),
        ("weights", [("transformers/modeling_utils.py", "from_pretrained", ""),
                     ("transformers/modeling_utils.py", "caching_allocator_warmup", "")]),
        ("unknown", [("torch/nn/modules/linear.py", "forward", "F.linear(input, self.weight)")]),
        ("weights", [("torch/nn/modules/module.py", "convert", "t.to(device)")]),
        ("unknown", []),
    ],
)  # fmt: skip
def test_phases(phase: str, frames: list[tuple[str, str, str]]) -> None:
    stack = tuple(PythonFrame(path=SITE + path, function=f, code=code) for path, f, code in frames)
    assert phase_of(stack) == phase


def test_a_program_s_name_says_nothing() -> None:
    program = "/data/my_vision_demo.py"
    stack = [
        PythonFrame(path=program, function="<module>"),
        PythonFrame(path=program, function="go"),
    ]
    assert phase_of(tuple(stack)) == "unknown"
    windows = PythonFrame(path="C:\\site-packages\\x\\modeling_intern_vit.py", function="forward")
    assert phase_of((windows,)) == "vision"


def test_one_tensor_larger_than_the_card_needs_a_smaller_input() -> None:
    """No share of the card is enough; sdpa asked for it, so that no other call is advised."""
    tower = 'File "/opt/lmdeploy/pytorch/models/qwen2_5_vl.py", line 3, in forward'
    found = explain(
        f"{TRACE}  {tower}\n    output_i = F.scaled_dot_product_attention(q_i,\n"
        + SAID.replace("8.37", "128.00")
    )
    assert found.phase == "vision"
    assert len(found.changes) == 1
    assert found.changes[0].startswith("smaller images")
    assert "attn_implementation" not in " ".join(found.why)


def test_what_is_in_use_already_is_not_advised() -> None:
    torch = text(pid(7, "23.61 GiB"), cached="500.00 MiB")
    assert any("expandable_segments" in one for one in explain(torch).changes)
    used = explain(f"PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python demo.py\n{torch}")
    assert not any("expandable_segments" in one for one in used.changes)


QUANTISED = """\
$ lmdeploy lite auto_awq /models/Qwen2-VL-7B-Instruct --calib-seqlen 2048 --work-dir /models/out
GPU 0,1,2,3: NVIDIA GeForce RTX 4090
Traceback (most recent call last):
  File "/opt/lmdeploy/lite/quantization/calibration.py", line 315, in calibrate
    _ = model(data.to(self.device))
  File "/opt/transformers/models/llama/modeling_llama.py", line 968, in forward
    layer_outputs = decoder_layer(
"""


def test_a_quantisation_is_no_server() -> None:
    """It computes on one card: a shorter calibration helps."""
    found = explain(QUANTISED + SAID)
    assert (found.kind, found.phase) == ("out_of_memory", "quantising")
    assert "--calib-seqlen" in found.changes[0]
    assert found.would_work is None


CARD = "GPU 0 has a total capacity of 23.69 GiB of which 80.00 MiB is free. "
SERVER = "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B   # 1x RTX 3090\n"


def text(processes: str, allocated: str = "2.85 GiB", cached: str = "71.87 MiB") -> str:
    return (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 132.00 MiB."
        f" {CARD}{processes}"
        f"Of the allocated memory {allocated} is allocated by PyTorch, and {cached} is reserved by"
        " PyTorch but unallocated.\n"
    )


def pid(number: int, size: str) -> str:
    return f"Process {number} has {size} memory in use. "


def told(found: Diagnosis) -> str:
    return " ".join((*found.why, *found.changes, *found.unknown))


def test_the_only_process_is_the_server_itself() -> None:
    found = explain(SERVER + text(pid(2203446, "23.61 GiB")))
    assert [one.who for one in found.held] == ["this process (process 2203446 of the text)"]
    assert "the KV cache with" in told(found)
    assert not any("2203446" in one for one in found.changes)


def test_a_machine_whose_cards_others_fill_is_planned_as_empty() -> None:
    listed = (
        pid(7, "23.61 GiB")
        + "Including non-PyTorch memory, this process has 0.50 GiB memory in use. "
    )
    found = explain(text(listed, "0.10 GiB"), model="internvl2-8b", on="4xrtx3090")
    assert some(found.would_work).fits
    assert some(found.would_work).verdict.startswith("once ")
    assert any("is no part of" in one for one in found.changes)


@pytest.mark.parametrize(
    ("on", "without"),
    [
        ("1xrtx3090:free=20GiB", "1xrtx3090:used=3646MiB"),  # it has less than the log's others
        ("rtx3090+rtx4090", "1xrtx3090:used=3073MiB+1xrtx4090:used=3073MiB"),
    ],
)
def test_what_others_hold_is_taken_from_any_machine(on: str, without: str) -> None:
    listed = (
        pid(7, "3.00 GiB")
        + "Including non-PyTorch memory, this process has 20.61 GiB memory in use. "
    )
    found = explain(text(listed, "19.00 GiB"), model="internvl2-2b", on=on)
    assert some(found.would_work).fits
    assert some(found.would_work).on == without


def test_one_of_several_is_not_guessed() -> None:
    found = explain(
        text(pid(11, "9.00 GiB") + pid(12, "14.00 GiB")), model="internvl2-8b", on="1xrtx3090"
    )
    assert {one.who for one in found.held} == {"process 11", "process 12"}
    assert text_of("which process") in found.unknown
    assert any("(process 11, 12)" in one for one in found.changes)
    assert some(found.would_work).on == "1xrtx3090"


def test_lmdeploy_s_figures_do_not_tell_which() -> None:
    listed = pid(11, "3.30 GiB") + pid(12, "20.00 GiB")
    assert {one.who for one in explain(SERVER + text(listed)).held} == {"process 11", "process 12"}
    # Elsewhere torch holds all that a process has.
    plain = explain(text(listed))
    assert [one.who for one in plain.held] == [
        "this process (process 11 of the text)",
        "process 12",
    ]


def test_a_context_of_torch_2_0_is_charged_once() -> None:
    found = explain(
        "RuntimeError: CUDA out of memory. Tried to allocate 136.00 MiB (GPU 1; 23.69 GiB total"
        " capacity; 11.90 GiB already allocated; 43.69 MiB free; 22.90 GiB reserved in total by"
        " PyTorch)\n",
        model="cogvlm-17b",
        on="2xrtx3090",
    )
    assert some(found.would_work).on == "2xrtx3090"
    alone = plan(PlanRequest.of(model="cogvlm-17b", on=machine_from("2xrtx3090")))
    assert some(found.would_work).verdict == alone.verdict


@pytest.mark.parametrize(
    ("model", "card"),
    [("Qwen/Qwen3.5-27B", "NVIDIA H100 80GB HBM3"), ("Qwen/Qwen3.5-9B", "NVIDIA A100-SXM4-40GB")],
)
def test_states_that_have_no_room_are_cured_by_a_batch_with_its_number(
    model: str, card: str
) -> None:
    found = explain(
        f"lmdeploy serve api_server {model} --backend pytorch --max-batch-size 1024\n"
        f"GPU 0: {card}\nlmdeploy: 0.18.0\n"
        "AssertionError: No enough gpu memory for state cache. Please reduce max_batch_size.\n"
    )
    batch = int(some(re.fullmatch(r"--max-batch-size (\d+)", found.first))[1])
    asked = {"model": model, "on": some(found.read.machine), "engine": "pytorch"}
    for size, fits in ((batch, True), (1024, False)):
        request = PredictRequest.of(**asked, max_batch_size=size)
        prediction = predict(request, finds_remedies=False)
        assert prediction.fits == fits
        assert ("memory for state cache" in prediction.verdict) != fits
