"""Logs of other programs: one line each, no cause; and LMDeploy's, whatever else they name."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain, some
from turbofit.core.units import GIB

TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
    " capacity of 23.56 GiB of which 1.00 GiB is free."
)
#: Program, version, a word of its last error, and a log.
FOREIGN = [
    ("vLLM 0.10.1", "KV cache",
     "INFO 03-02 11:20:03 [api_server.py:1043] vLLM API server version 0.10.1\n"
     "(EngineCore_DP0 pid=77) ValueError: No available memory for the blocks of the KV cache."),
    ("vLLM", "Weight input_size",
     "(VllmWorker rank=0 pid=5) ERROR 04-16 11:12:31 [multiproc_executor.py:380] ValueError: Weight"
     " input_size_per_partition = 9472 is not divisible by min_thread_k = 128."),
    ("SGLang", "Not enough memory",
     "server_args=ServerArgs(model_path='/m/a', tp_size=1)\nRuntimeError: Not enough memory. Please"
     " try to increase --mem-fraction-static."),
    ("text-generation-inference", "Shard 0 failed",
     "2026-03-02T09:50:01Z ERROR text_generation_launcher: Shard 0 failed to start"),
    ("TensorRT-LLM 0.12.0", "Assertion",
     "[TensorRT-LLM] TensorRT-LLM version: 0.12.0\n[TRT-LLM] [E] Assertion failed: no engine"),
    ("llama.cpp", "failed to allocate",
     "llama_model_load: error loading model\nggml_backend: failed to allocate buffer"),
    ("Docker", "could not select device driver",
     'docker: Error response from daemon: could not select device driver "" with capabilities:'
     " [[gpu]]."),
    ("Kubernetes", "Insufficient",
     "Warning  FailedScheduling  2m  default-scheduler  0/3 nodes: 3 Insufficient nvidia.com/gpu."
     " Error"),
    ("pip", "No matching distribution", "ERROR: No matching distribution found for bar"),
    ("FastLLM", "Unsupport graph", "# deploy\n\nftllm server /mnt/vllm/m\nFastLLM Error: Unsupport"
     " graph model type a"),
    ("ComfyUI", "Cannot find", "# torch\n\n> RuntimeError: Cannot find a part\n"
     '>   File "D:\\\\ComfyUI\\\\execution.py", line 1, in f'),
    ("MLX", "no such key", 'File "/v/site-packages/mlx_lm/utils.py", line 1, in f\n'
     "ValueError: no such key"),
    ("MLC LLM", "no such", "# [Bug] x\n\nmlc_llm serve m\nERROR no such kernel"),
    ("systemd", "Failed to start", "host1 systemd[1]: Failed to start Baz daemon."),
]  # fmt: skip


@pytest.mark.parametrize(("program", "error", "log"), FOREIGN, ids=lambda text: text[:20])
def test_a_foreign_log_is_named_and_not_explained(program: str, error: str, log: str) -> None:
    found = explain(log)
    assert (found.kind, found.known, found.others) == ("unknown", False, None)
    assert found.what.startswith(f"a log of {program}, which turbofit does not explain")
    assert error in found.what
    assert (found.changes, found.send, found.also) == ((), (), ())


def test_its_memory_and_what_turbofit_would_run_are_told() -> None:
    log = f"vllm serve OpenGVLab/InternVL2-2B\nGPU 0: NVIDIA GeForce RTX 3090 (UUID: G)\n{TORCH}\n"
    found = explain(log)
    assert some(found.missing).bytes == GIB
    advice = some(found.would_work)
    assert advice.fits
    assert advice.command.startswith("turbofit serve OpenGVLab/InternVL2-2B")
    assert found.read.engine == "vllm"


@pytest.mark.parametrize(
    "mention",
    [
        "$ lmdeploy serve api_server m  # vLLM runs it",
        "I run the docker image of LMDeploy",
        '  File "/usr/bin/lmdeploy", line 3, in main',
        '  File "/v/lmdeploy/x.py", line 1, in f',
    ],
)
def test_a_log_of_lmdeploy_may_name_others(mention: str) -> None:
    found = explain(f"compared with vLLM 0.6.1 and vllm serve\n{mention}\n{TORCH}\n")
    assert found.kind == "out_of_memory"


def test_a_foreign_log_without_an_error_says_so() -> None:
    found = explain("INFO 03-02 [api_server.py:1043] vLLM API server version 0.10.1\n" * 3)
    assert "no line of it tells of an error" in found.what
    assert not found.known


def test_a_mention_of_another_program_is_no_log_of_it() -> None:
    said = explain("# the server does not answer\n\nAs for vLLM, I have not tried it.\n")
    assert said.read.engine is None
    assert explain("# it fails\n\nvllm serve m --port 80\n").read.engine == "vllm"
