"""Which part of a run a stack is of."""

from __future__ import annotations

import pytest

from turbofit.diagnose.rules.phases import phase_of
from turbofit.observe.log_events import PythonFrame

SITE = "/venv/site-packages/"


@pytest.mark.parametrize(
    ("phase", "frames"),
    [
        ("vision", [("lmdeploy/vl/engine.py", "forward", "")]),
        ("weights", [("lmdeploy/vl/model/builder.py", "load_vl_model", "")]),
        ("vision", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(1, 2))")]),
        ("text", [("x/modeling_qwen2_5_vl.py", "forward", "torch.matmul(q, k.transpose(2, 3))")]),
        ("warm-up", [("vllm/engine/llm_engine.py", "_initialize_kv_caches", ""),
                     ("vllm/worker/worker.py", "determine_num_available_blocks", ""),
                     ("vllm/model_executor/models/clip.py", "forward", "")]),
        ("cache", [("vllm/engine/llm_engine.py", "_initialize_kv_caches", ""),
                   ("vllm/worker/cache_engine.py", "_allocate_kv_cache", "")]),
        ("cache", [("lmdeploy/pytorch/engine/engine.py", "from_pretrained", ""),
                   ("lmdeploy/pytorch/engine/model_agent/agent.py", "build_cache_engine", "")]),
        ("warm-up", [("lmdeploy/pytorch/engine/engine.py", "from_pretrained", ""),
                     ("lmdeploy/pytorch/engine/model_agent/agent.py", "_warmup_prefill", ""),
                     ("lmdeploy/pytorch/strategies/base/model_inputs.py", "make_dummy_inputs",
                      "input_ids = torch.randint(0, vocab_size, (")]),
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
