"""What public reports showed to be wrong, and is right: the message, the first step, the place."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.logs.conftest import explain, message

#: Report: what is asked beside the text, the kind or message, words of the first step, the text.
REPORTS: Final[dict[str, tuple[dict[str, Any], str, str, str]]] = {
    "a ratio while the weights do not fit": (
        {}, "out_of_memory", "2 x NVIDIA GeForce RTX 4080",
        "lmdeploy serve api_server Qwen/Qwen3-30B-A3B-GPTQ-Int4 --log-level INFO\n"
        "GPU 0: NVIDIA GeForce RTX 4080\nLMDeploy: 0.18.0\n"
        "terminate called after throwing an instance of 'std::runtime_error'\n"
        "  what():  [TM][ERROR] CUDA runtime error: out of memory /lmdeploy/core/allocator.cc:49\n",
    ),
    "lmdeploy#3259": (
        {}, "out_of_memory", "--tp 4",
        "CUDA_VISIBLE_DEVICES=4,5,6,7 lmdeploy serve api_server /m/DeepSeek-R1-Distill-Qwen-32B\n"
        "[TM][ERROR] pointer_mapping_ does not have information of ptr at 0x1a9a0c2800. Assertion"
        " fail: /x/allocator.h:284\nAborted\n",
    ),
    "lmdeploy#3542": (
        {}, "crashed", "nvidia-cublas-cu12>=12.4.5.8",
        "GPU 0,1,2,3,4,5,6,7: NVIDIA H20\n*** SIGFPE received at time=1 on cpu 2 ***\n"
        "Fatal Python error: Floating point exception\n\nStack (most recent call first):\n"
        '  File "/opt/lmdeploy/pytorch/backends/default/linear.py", line 36 in forward\n',
    ),
    "lmdeploy#3724": (
        {}, "wrong_quantization", "--quant-policy 0 where it was set",
        '  File "/x/triton/language/semantic.py", line 1, in dot\n    assert\n'
        "AssertionError: Both operands must be same dtype. Got int8 and bf16\n",
    ),
    "lmdeploy#3078": (
        {}, "image_tokens", "leave the image token to the chat template",
        "lmdeploy serve api_server Qwen/Qwen2-VL-7B-Instruct\n/p/IndexKernel.cu:353:"
        " masked_scatter_size_check: block: [0,0,0], thread: [0,0,0] Assertion `totalElements <="
        " srcSize` failed.\nTask <MainLoopBackground> failed\n"
        "RuntimeError: CUDA error: device-side assert triggered\n",
    ),
    "ms-swift#6307": (
        {}, "unknown", "",
        "[INFO:swift] Traceback (most recent call last):\n"
        '  File "/opt/swift/llm/infer/infer_engine/lmdeploy_engine.py", line 310, in infer_async\n'
        "    inputs = await loop.run_in_executor(None, template.encode, infer_request)\n"
        "swift.llm.template.base.MaxLengthError: Current length of row(11744) is larger than the"
        ' max_length(8600).\nINFO:     10.0.0.2:46342 - "POST /v1/chat/completions HTTP/1.1" 400'
        " Bad Request\n",
    ),
    "production-stack#276": (
        {}, "shared_memory", "--shm-size",
        "torch.distributed.DistBackendError: NCCL error in: ../NCCLUtils.hpp:317, unhandled system"
        " error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nLast error:\n"
        "Error while creating shared memory segment /dev/shm/nccl-F9ffgB (size 9637888)\n",
    ),
    "lmdeploy#3993": (
        {"hang": True}, "stands_still", "NCCL_P2P_DISABLE=1",
        "lmdeploy serve api_server --tp 2 --backend pytorch /models/InternVL3_5-8B\n"
        "GPU 0,1,2,3,4,5: NVIDIA RTX A6000\n"
        "InternVL3_5-8B runs well with tp=1 but stuck during starting up with tp=2.\n",
    ),
    "a hang with one card": (
        {"hang": True}, "stands_still", "py-spy dump",
        "lmdeploy serve api_server internvl2-8b --tp 1\nGPU 0: NVIDIA RTX A6000\n",
    ),
    "a log that ends in the warm-up": (
        {}, "stands_still", "NCCL_P2P_DISABLE=1",
        "lmdeploy serve api_server /models/InternVL3_5-8B --tp 2\n[TM][INFO] [Gemm2] 8\n",
    ),
    "lmdeploy#4321": (
        {}, "unknown_option", "0.12.3 or newer",
        "lmdeploy serve api_server m --model-format compressed-tensors\nlmdeploy serve api_server:"
        " error: argument --model-format: invalid choice: 'compressed-tensors' (choose from hf)\n",
    ),
    "InternLM#678": (
        {}, "unknown_option", "--session-len in its place",
        "usage: lmdeploy [-h] {chat,lite,serve} ...\n"
        "lmdeploy: error: unrecognized arguments: --session_len 200000\n",
    ),
    "lmdeploy#3100": (
        {}, "package_versions", "a newer LMDeploy",
        '  File "/x/lmdeploy/pytorch/engine/logits_process.py", line 1, in <module>\n'
        "ImportError: cannot import name 'LogitsWarper' from"
        " 'transformers.generation.logits_process' (/x)\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_read_rightly(name: str) -> None:
    asked, kind, first, text = REPORTS[name]
    found = explain(text, **asked)
    assert (message(found), first in found.first) == (kind, True)


def test_the_exception_above_an_access_line_is_the_message() -> None:
    found = explain(REPORTS["ms-swift#6307"][3])
    assert "MaxLengthError: Current length of row(11744)" in found.what


def test_a_run_that_saw_one_card_is_planned_for_one() -> None:
    log = (
        "CUDA_VISIBLE_DEVICES=2 lmdeploy serve api_server Qwen/Qwen2.5-32B-Instruct-AWQ\n"
        "GPU 0,1,2,3: NVIDIA GeForce RTX 4080\n"
        "[TM][FATAL][1120.09:18:10.597172][allocator.cc:49] CUDA error: out of memory\n"
    )
    found = explain(log)
    assert found.read.machine == "1xrtx4080"


@pytest.mark.parametrize(
    ("frame", "phase"),
    [("eager_attention_forward", "unknown"), ("VisionAttention_forward", "vision")],
)
def test_attention_that_tower_and_model_share(frame: str, phase: str) -> None:
    """VLMEvalKit#1183: the function is of both, and only a frame above it tells which."""
    above = '  File "/x/modeling_qwen2_5_vl.py", line 9, in visual\n    self.blocks(x)\n'
    log = (
        f"Traceback (most recent call last):\n{'' if phase == 'unknown' else above}"
        f'  File "/x/transformers/models/m/modeling_qwen2_5_vl.py", line 100, in {frame}\n'
        "    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 28.43 GiB. GPU 0 has a total"
        " capacity of 15.77 GiB of which 5.00 GiB is free.\n"
    )
    found = explain(log)
    assert found.phase == phase
    assert found.first.startswith('attn_implementation="sdpa"')
