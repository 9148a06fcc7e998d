"""Short logs of the kinds that public reports have: what is said first, and what is not said."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.logs.conftest import explain, message, some

OUT: Final = "CUDA runtime error: out of memory /opt/lmdeploy/src/turbomind/utils/allocator.h"
EXIT: Final = (
    '  File "/o/site-packages/lmdeploy/pytorch/engine/request.py", line 175, in get\n'
    "    exit(1)\nSystemExit: 1\n"
)
RANK: Final = (
    "lmdeploy serve api_server /data/Moon --backend turbomind --tp 2\n"
    "2024-04-13 09:58:58,101 - lmdeploy - ERROR - rank[0] failed with error: the moon is full.\n"
)
CHAIN: Final = (
    "Traceback (most recent call last):\n"
    '  File "/o/lmdeploy/pytorch/models/patch.py", line 180, in build_model_from_hf_config\n'
    "    model_cls = get_model_class(model_config)\nMoonError: of June\n\n"
    "During handling of the above exception, another exception occurred:\n\n"
    "Traceback (most recent call last):\n"
    '  File "/o/lmdeploy/pytorch/engine/engine.py", line 410, in __init__\n'
    "    raise RuntimeError('engine could not be built')\nRuntimeError: engine could not be built\n"
)
PEERS: Final = "".join(
    f"[TM][WARNING] Device 0 peer access Device {n} is not available.\n" for n in (1, 2, 3)
)
ANSWERED: Final = (
    "swift deploy --model_type qwen2_5-7b-instruct --infer_backend lmdeploy --port 6006\n"
    'GPU 0: NVIDIA GeForce RTX 4090\nINFO:     10.1.0.5:41020 - "POST /v1/chat/completions'
    " HTTP/1.1\" 200 OK\nterminate called after throwing an instance of 'std::runtime_error'\n"
    f"  what():  [TM][ERROR] {OUT}:233\n"
)


def torch(asked: str, free: str = "8.88 MiB", **more: Any) -> str:
    return (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total"
        f" capacity of 22.17 GiB of which {free} is free.{more.get('rest', '')}\n"
    )


def test_a_worker_s_own_line_goes_before_the_exit_that_follows() -> None:
    assert "the moon is full" in explain(RANK + EXIT).what


def test_an_exit_is_not_the_cause_where_a_line_above_reports_an_error() -> None:
    found = explain(f"2024-04-13 09:58:58,101 - lmdeploy - ERROR - the moon is full\n{EXIT}")
    assert "the moon is full" in found.what
    assert "SystemExit" in explain(EXIT).what


def test_of_chained_exceptions_the_first_is_quoted_and_the_last_is_named() -> None:
    found = explain(CHAIN)
    assert "MoonError: of June" in found.what
    assert any("not be built followed" in one for one in found.why)
    assert [one.line for one in found.evidence] == [4, 11]


def test_what_is_not_chained_is_as_before() -> None:
    found = explain(CHAIN.replace("During handling of the above", "Then, after the above"))
    assert "could not be built" in found.what


def test_of_two_runs_that_died_the_later_is_answered() -> None:
    command = "lmdeploy serve api_server internvl3-8b\n"
    found = explain(
        f"{command}  what():  [TM][ERROR] {OUT}:233\n{command}ValueError: Port 1 is not available\n"
    )
    assert found.kind == "port_taken"
    assert any("out of GPU memory" in one for one in found.also)


def test_an_answer_proves_that_the_server_served() -> None:
    found = explain(ANSWERED)
    assert found.phase == "serving"
    assert "its cache was made" in found.what
    assert "--cache-max-entry-count 0.7" in found.first
    assert explain("".join(ANSWERED.splitlines(keepends=True)[:3])).kind == "healthy"


@pytest.mark.parametrize("call", ["to", "cuda", "half"])
def test_to_move_a_module_is_to_load_it(call: str) -> None:
    found = explain(
        '  File "/d/CogVLM/composite_demo/client.py", line 8, in load\n'
        f"    model = AutoModel.from_config(c).{call}(device).eval()\n"
        f'  File "/v/torch/nn/modules/module.py", line 1150, in {call}\n'
        f"    return self._apply(convert)\n{torch('136.00 MiB')}"
    )
    assert found.phase == "weights"


def test_lines_of_peers_tell_the_degree() -> None:
    log = f"{PEERS}[TM][ERROR] {OUT}:246\n"
    assert explain(log).read.tp == 4
    assert some(explain(log, model="internvl2-8b", on="4xrtx3090").would_work).settings["tp"] == 4
    assert explain(log, model="internvl2-8b", on="1xrtx3090").would_work is not None


def test_offloaded_weights_prove_that_the_card_was_not_free() -> None:
    found = explain(
        "Some parameters are on the meta device because they were offloaded to the cpu.\n"
        "/v/torch/nn/functional.py in silu(input, inplace)\n"
        "   2057         return torch._C._nn.silu_(input)\n"
        f"-> 2059     return torch._C._nn.silu(input)\n{torch('14.00 MiB')}",
        model="llava-1.5-7b",
    )
    assert found.phase == "text"  # a forward, and so no loading
    assert found.first.startswith("free the cards first")
    assert any("LLaVA-1.5-7B is 13.2 GiB" in one for one in found.why)


def test_small_weights_on_a_full_card_are_not_answered_with_smaller_ones() -> None:
    found = explain(
        '  File "/v/transformers/modeling_utils.py", line 9, in from_pretrained\n    load(m)\n'
        f"{torch('20.00 MiB', '3.06 MiB')}",
        model="internvl2-2b",
    )
    assert found.first.startswith("free the cards first")
    assert any("4.1 GiB of weights" in one for one in found.why)


@pytest.mark.parametrize(
    ("line", "model"),
    [
        ("path = os.environ.get('MODEL_PATH', 'OpenGVLab/InternVL2-8B')", "InternVL2-8B"),
        ("p.add_argument('--from_pretrained', default='OpenGVLab/InternVL2-8B')", "InternVL2-8B"),
        (
            '  File "/c/modules/transformers_modules/InternVL2-8B/m.py", line 1, in f',
            "InternVL2-8B",
        ),
        ("model = '/c/hub/Qwen/Qwen2___5-VL-7B-Instruct'", "Qwen2.5-VL-7B-Instruct"),
    ],
)
def test_code_and_frames_name_the_model(line: str, model: str) -> None:
    assert explain(f"{line}\n{torch('20.00 MiB')}").read.model == model


@pytest.mark.parametrize("name", ["LlavaLlamaForCausalLM", "Qwen2ForCausalLM"])
def test_the_class_of_a_model_is_named_where_its_size_is_not(name: str) -> None:
    log = f'  File "/l/modeling.py", line 1, in {name}.forward\n{torch("2.00 MiB")}'
    assert any(name in one for one in explain(log).unknown)


def test_a_jetson_is_told_what_runs_there() -> None:
    found = explain(f"GPU 0: Orin\nLMDeploy: 0.7.0.post3\nRuntimeError: [TM][ERROR] {OUT}:246\n")
    assert (message(found), "llama.cpp" in found.first) == ("out_of_memory", True)


def test_torch_alone_fills_the_card_so_more_of_the_visible_cards_are_taken() -> None:
    rest = (
        " Including non-PyTorch memory, this process has 14.45 GiB memory in use. Of the allocated"
        " memory 14.30 GiB is allocated by PyTorch, and 711.50 KiB is reserved by PyTorch but"
        " unallocated."
    )
    found = explain(
        "CUDA_VISIBLE_DEVICES=0,1,2 lmdeploy serve api_server ../Moon-7B-Chat --tp 1\n"
        "GPU 0,1,2: Tesla T4\n"
        + torch("172.00 MiB", "118.00 MiB", rest=rest).replace("22.17", "14.57")
    )
    assert found.phase == "weights"
    assert found.first.startswith("--tp 2: 3 cards are visible")
