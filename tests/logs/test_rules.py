"""Packages that do not go together: cause and the line that mends it."""

from __future__ import annotations

import re

import pytest

from tests.logs.conftest import explain, message, some, tried

TRACE = "Traceback (most recent call last):\n"


def frame(path: str, function: str, call: str = "") -> str:
    code = f"    {call}\n" if call else ""
    return f'  File "/venv/site-packages/{path}", line 1, in {function}\n{code}'


@pytest.mark.parametrize(
    ("error", "mends"),
    [
        ("AttributeError: 'dict' object has no attribute 'num_attention_heads'",
         'pip install "transformers<4.52"'),
        ("AttributeError: 'LlavaConfig' object has no attribute 'attention_dropout'",
         "transformers==VERSION"),
        ("AttributeError: 'DynamicCache' object has no attribute 'seen_tokens'",
         'pip install "transformers<4.54"'),
        ("ImportError: cannot import name 'Gemma3TextConfig' from 'transformers' (/x)",
         'pip install "transformers>=4.50"'),
        ("ImportError: cannot import name 'LLM' from 'outlines' (/x)", "version of outlines"),
        ("2025-01-01 10:00:00,125 - lmdeploy - ERROR - AttributeError: 'InternVLChatConfig' object "
         "has no attribute 'hidden_size'", "pip install -U lmdeploy"),
        ("model `/data/x` requires transformers version 4.46 but transformers 4.36.2 is installed.",
         'pip install "transformers==4.46"'),
    ],
)  # fmt: skip
def test_an_error_and_the_line_that_mends_it(error: str, mends: str) -> None:
    found = explain(f"$ lmdeploy serve api_server m\n{error}\n")
    assert message(found) == "package_versions"
    assert any(mends in one for one in tried(found))
    assert found.evidence[0].line == 2


@pytest.mark.parametrize(
    "error",
    [
        "AttributeError: 'dict' object has no attribute 'append'",
        "AttributeError: 'str' object has no attribute 'shape'",
        "TypeError: f() got an unexpected keyword argument 'x'",
    ],
)
def test_errors_of_people_s_programs_are_not_of_versions(error: str) -> None:
    of_a_person = explain(f'{TRACE}  File "/data/main.py", line 1, in main\n{error}\n')
    assert message(of_a_person) == "unknown"
    of_lmdeploy = message(explain(f"{TRACE}{frame('lmdeploy/archs.py', 'get')}{error}\n"))
    assert of_lmdeploy == ("package_versions" if "keyword" in error else "unknown")


def test_a_module_is_no_package_and_a_newer_lmdeploy_is_the_other_way() -> None:
    module = "transformers.generation.logits_process"
    error = f"ImportError: cannot import name 'LogitsWarper' from '{module}' (/x)"
    found = explain(
        f"{TRACE}{frame('lmdeploy/pytorch/engine/logits_process.py', '<module>')}{error}\n"
    )
    assert some(found.others).had[0].startswith("the installed transformers ")
    assert tried(found)[0].startswith("a newer LMDeploy")
    of_another = explain(f"{TRACE}{frame('outlines/x.py', '<module>')}{error}\n")
    assert tried(of_another)[0].startswith("the version of transformers")


ARCHES = "The current PyTorch install supports CUDA capabilities {}.\n"


CARD = "{} with CUDA capability {} is not compatible with the current PyTorch installation.\n"


NO_KERNEL = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"


@pytest.mark.parametrize(
    ("log", "kind", "said"),
    [
        (CARD.format("RTX 5070", "sm_120") + ARCHES.format("sm_70 sm_80 sm_90"), "gpu_too_new",
         "the build ends at sm_90"),
        (CARD.format("GTX 1080", "sm_61") + ARCHES.format("sm_75 sm_80 sm_120"), "gpu_too_old",
         "the build begins at sm_75"),
        ("GPU 0: NVIDIA GeForce RTX 5080\n" + NO_KERNEL, "gpu_too_new", "sm_120"),
    ],
)  # fmt: skip
def test_a_build_for_other_cards_is_too_old_or_too_new(log: str, kind: str, said: str) -> None:
    found = explain(log)
    assert found.kind == kind
    assert said in found.what


FPE = "lmdeploy serve api_server {} --tp {}\n{}floating point exception (core dumped)\n"


@pytest.mark.parametrize(
    ("log", "step"),
    [
        # lmdeploy#2089 and lmdeploy#2269, whose config the debugger printed.
        (FPE.format("THUDM/glm-4v-9b", 4, "LMDeploy: 0.5.0\n"), "--tp 2, "),
        (FPE.format("Qwen/Qwen2-1.5B", 4, "head_num=12, kv_head_num=2, size_per_head=128\n"),
         "--tp 2, "),
        (FPE.format("internvl2-8b", 6, "LMDeploy: 0.6.4\n"), "--tp 2, "),
    ],
)  # fmt: skip
def test_a_tp_that_the_kv_heads_are_not_divided_by(log: str, step: str) -> None:
    found = explain(log)
    assert found.kind == "tp_impossible"
    assert found.first.startswith(step)


@pytest.mark.parametrize(
    ("log", "named"),
    [
        (FPE.format("Qwen/Qwen2-1.5B", 4, ""), True),  # the heads are not known
        (FPE.format("Qwen/Qwen2-VL-7B-Instruct", 8, ""), True),  # nor is the release
        (FPE.format("THUDM/glm-4v-9b", 2, ""), False),
        (FPE.format("THUDM/glm-4v-9b", 4, "LMDeploy: 0.6.5\n"), False),
        (FPE.format("THUDM/glm-4v-9b --backend pytorch", 4, ""), False),
    ],
)
def test_other_floating_point_exceptions_have_other_causes(log: str, named: bool) -> None:
    found = explain(log)
    assert found.kind == "unknown"
    assert any("KV heads" in one for one in some(found.others).had) is named


def test_a_name_without_an_address() -> None:
    other = explain("socket.gaierror: [Errno -2] Name or service not known")
    own = explain("ERROR:    [Errno -2] Name or service not known")
    assert (other.kind, own.kind) == ("wrong_setting", "wrong_setting")
    assert ("--server-name" in own.what, "--server-name" in other.what) == (True, False)


def test_a_name_without_an_address_is_not_the_cause_of_a_later_error() -> None:
    """A client's picture did not resolve, and a host without a network lacks the model."""
    name = "socket.gaierror: [Errno -2] Name or service not known\n"
    memory = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB.\n"
    ready = "INFO:     Uvicorn running on http://0.0.0.0:23333\n"
    serves = "$ lmdeploy serve api_server OpenGVLab/InternVL2-8B\n"
    assert explain(f"{serves}{ready}{TRACE}{name}\n{TRACE}{memory}").kind == "out_of_memory"
    hub = "HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /m"
    hub = f"urllib3.exceptions.MaxRetryError: {hub}\n"
    assert explain(f"{serves}{TRACE}{name}\n{TRACE}{hub}").kind == "no_hub"


def test_of_two_cards_one_that_is_too_old_is_named() -> None:
    cards = "GPU 0: Tesla T4\nGPU 1: NVIDIA GeForce GTX 1080\n"
    error = "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
    serves = "lmdeploy serve api_server OpenGVLab/InternVL2-8B\n"
    assert explain(f"{serves}{cards}{error}").kind == "gpu_too_old"


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("Qwen3VLForConditionalGeneration", "pip install -U lmdeploy"), ("NobodysModel", "another")],
)
def test_an_architecture_that_a_newer_lmdeploy_runs(architecture: str, said: str) -> None:
    found = explain(f"RuntimeError: Can not found rewrite for architectures: ['{architecture}']")
    assert message(found) == "unsupported_model"
    assert any(said in one for one in tried(found))


def test_an_error_that_nobody_knows_goes_before_what_its_parent_says() -> None:
    parent = "RuntimeError: Rank[0] failed."
    found = explain(f"ZeroDivisionError: division by zero\n{parent}\n")
    assert found.kind == "unknown"
    assert "ZeroDivisionError" in found.what
    assert message(explain(f"$ lmdeploy\n{parent}")) == "engine_gone"


def test_versions_of_the_log_prove_what_the_message_leaves_open() -> None:
    line = "RuntimeError: Can not found rewrite for architectures: ['Qwen2_5_VLForConditional"
    line += "Generation']"
    old = explain(f"lmdeploy==0.7.1\n{line}\n")
    assert (old.kind, old.others) == ("unsupported_model", None)
    assert "0.7.2 or newer" in old.changes[0]
    assert explain(f"lmdeploy==0.9.0\n{line}\n").kind == "unknown"


def test_no_answer_shows_a_key() -> None:
    found = explain(
        "curl: error fetching https://user:hunter2secret@host/x?token=hf_abcdefghij0123 denied:"
        " Authorization: Bearer sk-abcdefgh1234\n"
    )
    said = found.what + found.evidence[0].text
    assert "host/x" in said
    assert not re.search("hunter2|hf_|sk-", said)
    kept = explain("KeyError: 'hf_quant_config.json' image_token=<image>\n")
    assert "hf_quant_config.json' image_token=<image>" in kept.what


def test_a_value_that_the_log_itself_has_comes_first() -> None:
    line = "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"
    found = explain(f"$ lmdeploy serve api_server /m/Moon-7B-AWQ-G32\n{line}\n")
    assert some(found.others).had[0].startswith("groups of 32")
