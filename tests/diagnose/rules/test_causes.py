"""`presets/causes.yaml`: what a row takes for its message, and what it computes from the log."""

from __future__ import annotations

import re

import pytest

from tests.diagnose.conftest import explain
from turbofit.core.units import GIB
from turbofit.diagnose.rules.causes import causes
from turbofit.diagnose.rules.figures import FIGURES

ARCHES = "The current PyTorch install supports CUDA capabilities {}.\n"
CARD = "{} with CUDA capability {} is not compatible with the current PyTorch installation.\n"
NO_KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
VLLM = (
    "INFO 02-26 09:54:05 worker.py:267] the current vLLM instance can use total_gpu_memory"
    " ({}GiB) x gpu_memory_utilization (0.70) = 16.80GiB\n"
    "INFO 02-26 09:54:05 worker.py:267] model weights take {}GiB; non_torch_memory takes 0.10GiB;"
    " PyTorch activation peak memory takes 2.40GiB; the rest of the memory reserved for KV Cache is"
    " {}GiB.\n"
    "ValueError: No available memory for the cache blocks. Try increasing"
    " `gpu_memory_utilization` when initializing the engine.\n"
)
LONGEST = (
    "ValueError: To serve at least one request with the models's max seq len (65536), (7.50 GiB KV"
    " cache is needed, which is larger than the available KV cache memory (6.25 GiB). Based on the"
    " available memory, the estimated maximum model length is 54608. Try increasing"
    " `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."
)


@pytest.mark.parametrize(
    "line",
    [
        "INFO 03-01 10:00:01 [core.py:58] Initializing a V1 LLM engine (v0.9.1) with config:"
        " model='/m/a', tokenizer='/m/a', trust_remote_code=False, dtype=torch.float16",
        "Launching model qwen2 with following model config: {'model_path': '/m', 'tp': 2,"
        " 'trust_remote_code': True, 'device': 'cuda'}",
        "args: Namespace(model='a', tp=2, trust_remote_code=True, port=8000)",
        "The argument `trust_remote_code` is to be used with Auto classes. It has no effect here",
    ],
)
def test_a_dump_of_settings_is_no_message(line: str) -> None:
    assert explain(line).kind == "unknown"
    assert explain(f"{line}\nINFO:     Application startup complete.\n").kind == "healthy"
    died = explain(f"{line}\nRuntimeError: CUDA error: invalid device ordinal\n")
    assert (died.kind, died.also) == ("no_such_gpu", ())


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: The repository for x contains custom code which must be executed to correctly"
        " load the model. Please pass the argument `trust_remote_code=True` to allow it.",
        "ValueError: Loading x requires you to execute the configuration file in that repo on your"
        " local machine. Make sure you have read the code there, then set the option"
        " `trust_remote_code=True` to remove this error.",
    ],
)
def test_what_refuses_a_checkpoints_code(line: str) -> None:
    assert explain(line).kind == "remote_code"


def test_what_an_engine_outlived_is_no_cause() -> None:
    warned = CARD.format("NVIDIA X", "sm_61") + "INFO:     Uvicorn running on http://0.0.0.0:1\n"
    assert explain(warned).kind == "healthy"


@pytest.mark.parametrize(
    ("log", "kind", "said"),
    [
        (CARD.format("RTX 5070", "sm_120") + ARCHES.format("sm_70 sm_80 sm_90"), "gpu_too_new",
         "the build ends at sm_90"),
        (CARD.format("GTX 1080", "sm_61") + ARCHES.format("sm_75 sm_80 sm_120"), "gpu_too_old",
         "the build begins at sm_75"),
        ("GPU 0: NVIDIA GeForce RTX 5080\n" + NO_KERNEL, "gpu_too_new", "sm_120"),
        ("GPU 0: Tesla V100-SXM2-32GB\n" + NO_KERNEL, "gpu_too_old", "sm_70"),
        (NO_KERNEL, "no_kernel_image", "no code for this card"),
        ("RuntimeError: [TM][ERROR] CUDA runtime error: no kernel image is available for execution"
         " on the device /l/llama_kernels.cu:80", "no_kernel_image", "no code for this card"),
    ],
)  # fmt: skip
def test_a_build_for_other_cards_is_too_old_or_too_new(log: str, kind: str, said: str) -> None:
    found = explain(log)
    assert found.kind == kind
    assert said in found.what
    if kind == "no_kernel_image":
        assert found.unknown


def test_vllm_without_room_for_any_cache() -> None:
    found = explain(VLLM.format("24.00", "15.50", "-1.20"))
    assert found.missing is not None
    assert found.missing.bytes == round(1.2 * GIB)
    assert any("above 0.75," in one for one in found.changes)  # (15.5 + 0.1 + 2.4) / 24
    more_than_the_card = explain(VLLM.format("24.00", "23.50", "-9.20"))
    assert not any("gpu-memory-utilization above" in one for one in more_than_the_card.changes)
    bare = explain(VLLM.splitlines()[-1])
    assert (bare.kind, bare.missing and bare.missing.bytes) == ("no_kv_memory", None)


@pytest.mark.parametrize("width", [None, 60, 79, 100, 118])
def test_the_length_that_vllm_says_would_do(width: int | None) -> None:
    """Wherever a terminal broke the line, at a space or in a word."""
    step = width or len(LONGEST)
    lines = [LONGEST[at : at + step].rstrip() for at in range(0, len(LONGEST), step)]
    found = explain("\n".join(lines[:7]) + "\n")
    assert found.kind == "no_kv_memory"
    assert found.missing is not None
    assert found.missing.bytes == round(1.25 * GIB)
    assert any("--max-model-len 54608" in one for one in found.changes)


@pytest.mark.parametrize("device", ["", "cuda:1 "])
def test_the_utilization_that_the_free_memory_allows(device: str) -> None:
    found = explain(
        f"ValueError: Free memory on device {device}(17.03/23.56 GiB) on startup is less than"
        " desired GPU memory utilization (0.9, 21.2 GiB). Decrease GPU memory utilization"
    )
    assert found.kind == "card_occupied"
    assert any("--gpu-memory-utilization 0.722 at most" in one for one in found.changes)
    assert found.missing is not None
    assert found.missing.bytes == round((21.2 - 17.03) * GIB)
    assert any("GPU 1" in one for one in found.why) == bool(device)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("Qwen3VLForConditionalGeneration", "pip install -U lmdeploy"), ("NobodysModel", "another")],
)
def test_an_architecture_that_a_newer_lmdeploy_runs(architecture: str, said: str) -> None:
    found = explain(f"RuntimeError: Can not found rewrite for architectures: ['{architecture}']")
    assert found.kind == "unsupported_model"
    assert any(said in one for one in found.changes)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was"
         " attempted on non supported HW", "driver_too_old"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please"
         " update your driver", "driver_too_old"),
        ("ImportError: /v/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda", "library_mismatch"),
        ("ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by /x)",
         "old_system"),
        ("ModuleNotFoundError: No module named 'einops'", "missing_package"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
         "no_kv_memory"),
        ("ValueError: This model's maximum context length is 4096 tokens. However, you requested"
         " 5000 tokens (4500 in the messages, 500 in the completion).", "request_rejected"),
        ("2025-01-01 - lmdeploy - ERROR - session 3 exceed session max length", "request_rejected"),
        ("KeyError: 'qwen3_vl_moe'", "old_transformers"),
        ("KeyError: 'weight'", "unknown"),
        ("[TP0] Watchdog timeout (self.watchdog_timeout=300)\nKilled", "hang"),
        ("[TM][WARNING] [RejectInvalidRequests] Skipping invalid infer request for id 3, code = 6",
         "request_rejected"),
    ],
)  # fmt: skip
def test_messages_of_programs_around_the_engine(line: str, kind: str) -> None:
    assert explain(line).kind == kind


def test_rows_use_figures_and_groups_that_exist() -> None:
    for cause in causes():
        groups = re.compile(cause.pattern).groupindex
        for text in (cause.what, *cause.why, *cause.change):
            named = {name for name in re.findall(r"\{(\w+)\}", text) if not name.isdigit()}
            assert named <= {*groups, *FIGURES}, cause.what
        assert set(cause.when) <= {*FIGURES, "communicator"}, cause.what
    assert len(FIGURES) <= 20
