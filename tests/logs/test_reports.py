"""What public reports showed to be wrong, and is right: the message, the first step, the place."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.logs.conftest import explain, message, some

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
    "lmdeploy#2430": (
        {}, "unknown", "the whole traceback of the error",
        "2024-09-06 02:46:34,547 - lmdeploy - WARNING - Fallback to pytorch engine because `/m/sun`"
        " not supported by turbomind engine.\nlmdeploy serve api_server /m/sun\n"
        "Traceback (most recent call last):\n"
        '  File "/usr/lib/python3.10/site-packages/lmdeploy/serve/vl.py", line 21, in __init__\n'
        "    self.vl_enc\n### Environment\n",
    ),
    "lmdeploy#2788": (
        {}, "unknown", "LMDeploy with --log-level INFO",
        "lmdeploy serve api_server /m/sun --tp 4\n2024-11-21 17:46:04,971 - lmdeploy - WARNING -"
        " archs.py:53 - Fallback to pytorch engine because `/m/sun` not supported by turbomind"
        " engine.\n2024-11-21 17:46:13,978 - lmdeploy - ERROR - agent.py:9 - moon is no sun\n",
    ),
    "lmdeploy#4123": (
        {}, "request_rejected", "leave out the field that the message names",
        "2025-11-15 11:59:12,743 - lmdeploy - WARNING - archs.py:45 - Fallback to pytorch engine"
        " because `/m/sun` not supported by turbomind engine.\nError code: 400 - {'message':"
        " 'Logprobs requested but not enabled.', 'type': 'invalid_request_error', 'code': 400}\n",
    ),
    "lmdeploy#4404": (
        {}, "turbomind_unsupported", "0.12.2 or newer",
        "Fallback to pytorch engine because `Qwen/Qwen3.5-35B-A3B` not supported by turbomind"
        " engine.\n",
    ),
    "lmdeploy#4187": (
        {}, "turbomind_unsupported", "no release up to",
        "Fallback to pytorch engine because `Qwen/Qwen3-VL-32B-Instruct` not supported by turbomind"
        " engine.\n",
    ),
    "InternVL#538": (
        {}, "out_of_memory", "more GPUs (--tp), a smaller or quantised model",
        "I met `RuntimeError: [TM][ERROR] CUDA runtime error: out of memory"
        " /lmdeploy/src/turbomind/utils/memory_utils.cu:32`. My machine is an A100 80G. Why?\n"
        "pipe = pipeline('OpenGVLab/InternVL2-40B')\n",
    ),
    "lmdeploy#1019": (
        {}, "out_of_memory", "with 0.8, the default since 0.2.2, it ran out of memory",
        "from lmdeploy import pipeline\n"
        "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory /x/utils/allocator.h:231\n",
    ),
    "words of a person right before an exception": (
        {}, "missing_package", "triton",
        "我的问题是ModuleNotFoundError: No module named 'triton'\n",
    ),
    "lmdeploy#2164": (
        {}, "gpu_too_new", "sm_90a from 12.0 on",
        "ptxas fatal   : Value 'sm_90a' is not defined for option 'gpu-name'\n"
        "|   0  NVIDIA H100 80GB HBM3          On  | 00000000:0F:00.0 Off |              0 |\n",
    ),
    "lmdeploy#2691": (
        {}, "stands_still", "NCCL_P2P_DISABLE=1",
        "api_server 方式部署有概率卡住\nlmdeploy serve api_server /m/InternVL2-40B --tp 4\n",
    ),
    "OpenGVLab/InternVL#274": (
        {}, "stands_still", "py-spy dump",
        "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n"
        "When I include an image in the messages, the server does not respond.\n",
    ),
    "lmdeploy#2528": (
        {}, "stands_still", "py-spy dump",
        "[TM][INFO] --------- step = 2500 ---------\n"
        "after several hours, lmdeploy would hang with the GPU utilization at 0\n",
    ),
    "words alone of a lack of memory": (
        {}, "out_of_memory", "--cache-max-entry-count",
        "lmdeploy serve api_server OpenGVLab/InternVL2-8B\n发了三张图就OOM，单卡4090\n",
    ),
    "a question about it": (
        {}, "unknown", "", "How to avoid OOM with InternVL2-8B? It may run out of memory\n",
    ),
    "a lack of the host's memory in words": (
        {}, "unknown", "", "加载时内存OOM，容器重启\n",
    ),
    "lmdeploy#3667": (
        {}, "package_versions", "another release of transformers",
        "Traceback (most recent call last):\n"
        '  File "/r/envs/lmdeploy/lib/python3.11/site-packages/lmdeploy/lite/a.py", line 1, in f\n'
        '  File "/r/envs/lmdeploy/lib/python3.11/site-packages/transformers/b.py", line 1, in g\n'
        "TypeError: 'NoneType' object is not callable\n",
    ),
    "advice for a server that hangs, and one that does not": (
        {}, "healthy", "",
        "If the server hangs, set NCCL_P2P_DISABLE=1\nIt does not hang any more\n"
        "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n",
    ),
    "torch warns of a hang": (
        {}, "healthy", "",
        "[rank0]:[W1124 ProcessGroupNCCL.cpp:4115] using GPU 0: this can cause a hang if the"
        " mapping is wrong\nINFO:     Uvicorn running on http://0.0.0.0:23333\n",
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
    "lmdeploy#1422": (
        {}, "weights_mismatch", "a newer LMDeploy, whose PyTorch engine runs AWQ",
        "lmdeploy serve api_server /data/Moon --backend turbomind --tp 2\n2024-04-13 09:58:47,584 -"
        " lmdeploy - WARNING - Fallback to pytorch engine because `/data/Moon` not supported by"
        " turbomind engine.\n2024-04-13 09:58:58,101 - lmdeploy - ERROR - rank[0] failed with"
        " error: model.layers.0.mlp.down_proj.qweight doesn't have any device set.\n"
        '  File "/o/site-packages/lmdeploy/pytorch/engine/request.py", line 175, in get\n'
        "    exit(1)\nSystemExit: 1\n",
    ),
    "MonkeyOCR#133": (
        {}, "virtual_gpu_memory", "a lower --cache-max-entry-count",
        "NVIDIA L20\nengine_config = PytorchEngineConfig(session_len=8192)\nsrc/hijack_call.c:575"
        " CUDA_ERROR_OUT_OF_MEMORY: Total real used gpu memory 25770852352 already exit\n"
        "Segmentation fault\n",
    ),
    "lmdeploy#1169": (
        {}, "virtual_gpu", "a newer LMDeploy, or the last release that ran there",
        "INFO:     Uvicorn running on http://0.0.0.0:23333 (Press CTRL+C to quit)\n[AMP ERROR]"
        "[CudaFrontend.cpp:94][1708430273:970157]failed to call cuCtxGetDevice(&device), error"
        " code: CUDA_ERROR_INVALID_CONTEXT\nBack trace dump:\n/usr/local/harp/lib/"
        "libvirtdev-frontend.so.0(LogStream::PrintBacktrace()+0x52) [0x7fb6d8ea6302]\n",
    ),
    "lmdeploy#1836": (
        {}, "calibration_data", "--dtype bfloat16, and another --calib-dataset",
        "lmdeploy lite auto_awq ./moon-7b-sft-merged --calib-dataset c4 --work-dir ./awq\n"
        "LMDeploy: 0.4.1\nTraceback (most recent call last):\n"
        '  File "/o/site-packages/lmdeploy/lite/quantization/awq.py", line 118, in smooth_ln_fcs\n'
        "    assert torch.isnan(p).sum() == 0\nAssertionError\n",
    ),
    "lmdeploy#2169": (
        {}, "calibration_data", "a mirror (HF_ENDPOINT) or a proxy",
        "lmdeploy lite auto_awq ./moon-1_8b-chat --calib-dataset ptb --work-dir ./w4\n"
        "Traceback (most recent call last):\n"
        '  File "/o/site-packages/lmdeploy/lite/utils/calib_dataloader.py", line 58, in get_ptb\n'
        "    traindata = load_dataset('ptb_text_only', 'penn_treebank', split='train')\n"
        "ConnectionError: Couldn't reach 'ptb_text_only' on the Hub (ConnectTimeout)\n",
    ),
    "ms-swift#5923": (
        {}, "package_versions", "the newest release of the program whose file made the call",
        "swift infer --model Qwen/Qwen2.5-VL-7B-Instruct --infer_backend lmdeploy\n"
        "Traceback (most recent call last):\n"
        '  File "/opt/ms-swift/swift/llm/infer/infer.py", line 85, in get_infer_engine\n'
        "    return infer_engine_cls(**kwargs)\nTypeError: LmdeployEngine.__init__() got an"
        " unexpected keyword argument 'reranker_use_activation'\n",
    ),
    "a Jetson, as lmdeploy#3143": (
        {}, "out_of_memory", "the PyTorch engine (--backend pytorch), which has to be built",
        'pipe = pipeline("./InternVL2_5-2B-4bit", backend_config=TurbomindEngineConfig('
        'model_format="awq"))\nGPU 0: Orin\nLMDeploy: 0.7.0\nRuntimeError: [TM][ERROR] CUDA runtime'
        " error: out of memory /lmdeploy/src/turbomind/utils/allocator.h:246\n",
    ),
    "lmdeploy#3971": (
        {}, "out_of_memory", "the PyTorch engine (--backend pytorch), which has to be built",
        "lmdeploy chat ./Moon-3B-AWQ/ --model-format awq\nGPU 0: Orin (nvgpu)\n[TM][ERROR] CUDA"
        " runtime error: out of memory /opt/lmdeploy/src/turbomind/core/allocator.cc:49\n",
    ),
    "MonkeyOCR#230": (
        {}, "out_of_memory", "freer cards, a smaller --max-batch-size",
        "Processing failed: No enough gpu memory for runtime.\n",
    ),
    "torch's whole line, as lmdeploy#1442": (
        {}, "out_of_memory", "--tp",
        "CUDA_VISIBLE_DEVICES=0,1,2 lmdeploy serve api_server ../Moon-7B-Chat --tp 1\n"
        "GPU 0,1,2: Tesla T4\ntorch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate"
        " 172.00 MiB. GPU 0 has a total capacty of 14.57 GiB of which 118.00 MiB is free.\n",
    ),
    "lmdeploy#3100": (
        {}, "package_versions", "a newer LMDeploy",
        '  File "/x/lmdeploy/pytorch/engine/logits_process.py", line 1, in <module>\n'
        "ImportError: cannot import name 'LogitsWarper' from"
        " 'transformers.generation.logits_process' (/x)\n",
    ),
    "lmdeploy#2660": (
        {}, "gpu_too_old", "no release and no setting of LMDeploy runs there",
        "lmdeploy serve api_server internvl2-2b\nGPU 0: Tesla P100-PCIE-16GB\n  what():  [TM]"
        "[ERROR] CUDA runtime error: no kernel image is available for execution on the device /x\n",
    ),
    "lmdeploy#2004": (
        {}, "no_flash_attention", "pip uninstall flash-attn",
        "GPU 0: Tesla V100-PCIE-32GB\nRuntimeError: FlashAttention only supports Ampere GPUs or"
        " newer.\n",
    ),
    "lmdeploy#2471": (
        {}, "ascend_operator", "the dlinfer-ascend that its page names",
        "lmdeploy serve api_server m --device ascend\nRuntimeError: The Inner error is reported as"
        " above. The current working operator name is aclnnFlashAttentionScore.\n",
    ),
    "MonkeyOCR#81": (
        {}, "build_failed", "a link libcuda.so",
        "/usr/bin/ld: cannot find -lcuda: No such file or directory\n",
    ),
    "a compiler's last words": (
        {}, "unknown", "LMDeploy with --log-level INFO",
        "lmdeploy serve api_server m\nLLVM ERROR: moon is no sun.\n"
        "*** SIGABRT received at time=1 on cpu 12 ***\n",
    ),
    "a worker's error without the word, before Ray's copy": (
        {}, "kernel_too_large", "TurboMind instead of",
        'Traceback (most recent call last):\n  File "/v/lmdeploy/pytorch/linear.py", line 3, in f\n'
        "    g(x)\ntriton.runtime.errors.OutOfResources: out of resource: shared memory, Required:"
        " 106496, Hardware limit: 101376.\nray.exceptions.RayTaskError(RuntimeError): ray::W.w()\n"
        "RuntimeError: [/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.4]\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_read_rightly(name: str) -> None:
    asked, kind, first, text = REPORTS[name]
    found = explain(text, **asked)
    assert (message(found), first in found.first) == (kind, True)


def test_the_exception_above_an_access_line_is_the_message() -> None:
    found = explain(REPORTS["ms-swift#6307"][3])
    assert "MaxLengthError: " in found.what


@pytest.mark.parametrize(
    ("card", "newer", "older"),
    [("NVIDIA A100-SXM4-80GB", False, False), ("Tesla T4", False, True),
     ("NVIDIA GeForce RTX 5090", True, False), ("", True, True)],
)  # fmt: skip
def test_a_cause_that_the_card_rules_out_is_not_told(card: str, newer: bool, older: bool) -> None:
    """lmdeploy#1083: a torch and a Triton that do not fit each other, on A100."""
    error = "RuntimeError: Triton Error [CUDA]: device kernel image is invalid\n"
    had = some(explain(f"GPU 0: {card}\n{error}").others).had
    assert any("is newer than" in cause for cause in had) is newer
    assert any("is older than the build" in cause for cause in had) is older


@pytest.mark.parametrize("words", ["版本", "版本：", "的版本是 ", "是", "  ：  "])
def test_a_release_in_chinese_words_is_read(words: str) -> None:
    """lmdeploy#3214: with the release the message proves its cause."""
    architecture = "Qwen2_5_VLForConditionalGeneration"
    error = f"RuntimeError: Can not found rewrite for architectures: ['{architecture}']"
    found = explain(f"更新了最新的lmdeploy{words}0.7.1之后\n{error}\n")
    assert (found.known, found.read.version) == (True, "0.7.1")


def test_the_words_before_an_abort_are_the_message() -> None:
    found = explain(REPORTS["a compiler's last words"][3])
    assert "LLVM ERROR: " in found.what


def test_a_known_thread_is_linked() -> None:
    found = explain(REPORTS["lmdeploy#3542"][3])
    assert any("github.com/InternLM/lmdeploy/issues/3542" in why for why in found.why)


def test_the_share_of_a_virtual_gpu_is_told() -> None:
    assert "24.0 GiB were in use" in explain(REPORTS["MonkeyOCR#133"][3]).what


@pytest.mark.parametrize(
    "log",
    [
        "pipe = pipeline('deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct',"
        " backend_config=PytorchEngineConfig(tp=1))\nGPU 0: NVIDIA RTX A6000\n"
        "triton.runtime.autotuner.OutOfResources: out of resource: shared memory, Required: 110080,"
        " Hardware limit: 101376. Reducing block sizes or `num_stages` may help.\n",
        "lmdeploy serve api_server OpenGVLab/InternVL2-8B-AWQ --cache-max-entry-count 0.1\n"
        "GPU 0: NVIDIA H20\n[Tue Dec 24 10:02:11 2024] Out of memory: Killed process 21877 (python)"
        " total-vm:301223456kB, anon-rss:187412332kB, file-rss:91256kB, shmem-rss:24576kB\n",
    ],
    ids=["kernel", "host"],
)
def test_no_plan_for_what_no_setting_of_the_gpu_changes(log: str) -> None:
    assert explain(log).would_work is None


TRACE = 'Traceback (most recent call last):\n  File "/opt/x/y.py", line 85, in get\n    return a\n'


@pytest.mark.parametrize(
    ("log", "asked"),
    [
        (f"swift infer --model m\n{TRACE}ZeroDivisionError: x\n", {"a report to the project"}),
        (f"$ lmdeploy lite auto_awq m\n{TRACE}ZeroDivisionError: x\n",
         {"LMDeploy with --log-level", "a report to the project"}),
        (f"{TRACE}ZeroDivisionError: x\n", {"the log from its start", "the command that was run"}),
        ("python -m moon\nZeroDivisionError: x\n", {"the whole traceback of the"}),
        ("ZeroDivisionError: x\n",
         {"the log from its start", "the whole traceback of the", "the command that was run"}),
    ],
)  # fmt: skip
def test_what_the_log_has_is_not_asked_for(log: str, asked: set[str]) -> None:
    found = explain(log)
    assert len(found.send) == len(asked)
    assert all(any(text.startswith(begin) for text in found.send) for begin in asked)


def test_a_run_that_saw_one_card_is_planned_for_one() -> None:
    log = (
        "CUDA_VISIBLE_DEVICES=2 lmdeploy serve api_server Qwen/Qwen2.5-32B-Instruct-AWQ\n"
        "GPU 0,1,2,3: NVIDIA GeForce RTX 4080\n"
        "[TM][FATAL][1120.09:18:10.597172][allocator.cc:49] CUDA error: out of memory\n"
    )
    assert explain(log).read.machine == "1xrtx4080"


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
