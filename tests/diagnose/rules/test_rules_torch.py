"""Torch's own out-of-memory inside LMDeploy's PyTorch engine: its options are what help."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain
from tests.diagnose.rules.test_rules_versions import TRACE, frame
from turbofit.diagnose.rules.rules_torch import phase_of
from turbofit.observe.log_events import PythonFrame

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


WSL = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
    " capacity of 15.92 GiB of which 0 bytes is free. Including non-PyTorch memory, this process"
    " has 17179869184.00 GiB memory in use. Of the allocated memory {} GiB is allocated by PyTorch,"
    " and 4.00 GiB is reserved by PyTorch but unallocated.\n"
)


def test_a_figure_that_cannot_be_is_unknown() -> None:
    found = explain(WSL.format("14.10"))
    assert [one.who for one in found.held] == ["this process's tensors"]
    assert not any("outside torch" in one for one in found.why)
    assert not any("expandable_segments" in one for one in found.changes)
    spilled = explain(WSL.format("40.25"))
    assert any("moved memory to the host" in one for one in spilled.why)


def test_torchs_own_limit_is_what_was_full() -> None:
    found = explain(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total"
        " capacity of 23.69 GiB of which 12.00 GiB is free. 9.50 GiB allowed; Of the allocated"
        " memory 9.00 GiB is allocated by PyTorch, and 100.00 MiB is reserved by PyTorch but"
        " unallocated.\n"
    )
    assert any("allowed 9.5 GiB" in one for one in found.why)


@pytest.mark.parametrize(
    ("path", "function", "phase", "option"),
    [
        ("/opt/vllm/v1/worker/gpu_model_runner.py", "capture_model", "warm-up", "--enforce-eager"),
        ("/opt/vllm/model_executor/models/qwen2_vl.py", "_process_image_input", "vision",
         "--limit-mm-per-prompt"),
        ("/opt/sglang/srt/model_loader/loader.py", "load_model", "weights", "--tp-size"),
        (f"{LMDEPLOY}/engine/agent.py", "build_cache_engine", "cache",
         "lower --cache-max-entry-count"),
        (f"{LMDEPLOY}/models/gpt_oss.py", "forward", "text", "--max-prefill-token-num"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "(EngineCore_DP0 pid=77) ERROR 10-20 11:01:00 [core.py:7] ",
                                    "[E] ", "2026-01-01 10:00:00,000 [ERROR] "])  # fmt: skip
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
    assert ("whole matrix" in " ".join(found.why)) == (phase != "cache")


@pytest.mark.parametrize(
    ("phase", "frames"),
    [
        ("vision", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(1, 2))")]),
        ("text", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(2, 3))")]),
        ("warm-up", [("vllm/engine/llm_engine.py", "_initialize_kv_caches", ""),
                     ("vllm/worker/worker.py", "determine_num_available_blocks", ""),
                     ("vllm/model_executor/models/clip.py", "forward", "")]),
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
    """No share of the card is enough; sdpa asked for it, and vLLM has no such option."""
    tower = 'File "/opt/vllm/model_executor/models/qwen2_5_vl.py", line 3, in forward'
    found = explain(
        f"{TRACE}  {tower}\n    output_i = F.scaled_dot_product_attention(q_i,\n"
        + SAID.replace("8.37", "128.00")
    )
    assert found.phase == "vision"
    assert [one.partition(" (")[0] for one in found.changes] == ["smaller images"]
    assert "attn_implementation" not in " ".join(found.why)


def test_the_method_that_a_worker_ran_tells_the_phase() -> None:
    found = explain(
        "ERROR 09-14 10:04:59 [multiproc_worker_utils.py:238] Exception in worker VllmWorkerProcess"
        " while processing method determine_num_available_blocks.\n"
        "torch.OutOfMemoryError: CUDA out of memory.\n"
    )
    assert found.phase == "warm-up"
    assert not any("traceback" in one for one in found.unknown)


def test_what_is_in_use_already_is_not_advised() -> None:
    trace = f'{TRACE}  File "/opt/vllm/v1/worker/gpu_model_runner.py", line 3, in profile_run\n'
    graphs = "--enforce-eager does without CUDA graphs"
    assert graphs in explain(trace + SAID).changes
    assert graphs not in explain(f"vllm serve /m --enforce-eager\n{trace}{SAID}").changes
    loading = "RuntimeError: [TM][ERROR] CUDA runtime error: out of memory /utils/memory_utils.cu:3"
    for model, smaller in (("InternVL2-8B-AWQ", "a smaller model"), ("InternVL2-8B", "quantised")):
        found = explain(f"lmdeploy serve api_server OpenGVLab/{model}\n{loading}\n")
        assert smaller in found.changes[0]
