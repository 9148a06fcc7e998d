"""`presets/causes.yaml`: what a row takes for its message, and what it computes from the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.diagnose.conftest import explain, message, some, tried
from turbofit.core.presets import load_yaml, presets_dir
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


def test_vllm_without_room_for_any_cache() -> None:
    found = explain(VLLM.format("24.00", "15.50", "-1.20"))
    assert some(found.missing).bytes == round(1.2 * GIB)
    assert any("above 0.75," in one for one in found.changes)  # (15.5 + 0.1 + 2.4) / 24
    more_than_the_card = explain(VLLM.format("24.00", "23.50", "-9.20"))
    assert not any("gpu-memory-utilization above" in one for one in more_than_the_card.changes)
    bare = explain(VLLM.splitlines()[-1])
    assert (bare.kind, bare.missing and bare.missing.bytes) == ("no_kv_memory", None)


#: Words of a guess: a row that needs them lists its causes in `possible`.
GUESSED = re.compile(r"most often|most likely|\beither \w|usually|probably|perhaps|\bmay be\b")
#: What Python, torch, CUDA and NCCL say of every program says what failed, not why.
OF_ALL = re.compile(
    r"object has no attribute|(?<!\(\?!)cannot import name|unexpected keyword argument"
    r"|device-side assert|illegal memory access|CUBLAS_STATUS|CUDNN_STATUS|unhandled system error"
    r"|contains either|mat1 and mat2 shapes|not enough\|too many"
)


def test_a_row_proves_a_cause_or_lists_what_others_had() -> None:
    for cause in causes():
        assert bool(cause.what) != bool(cause.possible), cause.pattern
        assert not cause.possible or (cause.change and not cause.why and not cause.unknown)
        assert not GUESSED.search(" ".join((cause.what, *cause.why))), cause.what
        certain = cause.when or "wheels of" in cause.source  # a wheel has a name, or has it not
        assert cause.possible or certain or not OF_ALL.search(cause.pattern), cause.pattern


@pytest.mark.parametrize("width", [None, 60, 79, 100, 118])
def test_the_length_that_vllm_says_would_do(width: int | None) -> None:
    """Wherever a terminal broke the line, at a space or in a word."""
    step = width or len(LONGEST)
    lines = [LONGEST[at : at + step].rstrip() for at in range(0, len(LONGEST), step)]
    found = explain("\n".join(lines[:7]) + "\n")
    assert found.kind == "no_kv_memory"
    assert some(found.missing).bytes == round(1.25 * GIB)
    assert any("--max-model-len 54608" in one for one in found.changes)


@pytest.mark.parametrize("device", ["", "cuda:1 "])
def test_the_utilization_that_the_free_memory_allows(device: str) -> None:
    found = explain(
        f"ValueError: Free memory on device {device}(17.03/23.56 GiB) on startup is less than"
        " desired GPU memory utilization (0.9, 21.2 GiB). Decrease GPU memory utilization"
    )
    assert found.kind == "card_occupied"
    assert any("--gpu-memory-utilization 0.722 at most" in one for one in found.changes)
    assert some(found.missing).bytes == round((21.2 - 17.03) * GIB)
    assert any("GPU 1" in one for one in found.why) == bool(device)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [("Qwen3VLForConditionalGeneration", "pip install -U lmdeploy"), ("NobodysModel", "another")],
)
def test_an_architecture_that_a_newer_lmdeploy_runs(architecture: str, said: str) -> None:
    found = explain(f"RuntimeError: Can not found rewrite for architectures: ['{architecture}']")
    assert message(found) == "unsupported_model"
    assert any(said in one for one in tried(found))


#: Messages of rows, most of which were learned from public reports, with made-up details.
LEARNED: list[tuple[str, str]] = yaml.safe_load(
    Path(__file__).with_name("learned.yaml").read_text(encoding="utf-8")
)


def test_what_a_server_refuses_goes_before_that_it_is_up() -> None:
    up = "INFO:     Application startup complete.\n"
    refused = "ERROR message='The model `/m/llava` does not exist.' type='NotFoundError' code=404\n"
    assert explain(up + refused).kind == "wrong_model_name"


FRESH = yaml.safe_load(Path(__file__).with_name("fresh.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("report", FRESH, ids=lambda report: report["report"])
def test_reports_of_the_newest_sets(report: dict[str, str]) -> None:
    found = explain(report["log"])
    assert message(found) == report["kind"]
    had = some(found.others).had if found.others else ("",)
    assert bool(found.others) == ("first" in report)
    assert report.get("first", "") in had[0]


@pytest.mark.parametrize(("kind", "line"), LEARNED, ids=lambda text: text[:40])
def test_kinds_that_people_report(kind: str, line: str) -> None:
    assert message(explain(f"INFO: a GPU server starts\n{line}\n")) == kind


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ("'message': 'Prompt length of 16180 is longer than the maximum model length 10000.",
         "16180 tokens, 10000 at most"),
        ("The decoder prompt (length 9000) is longer than the maximum model length of 8192.",
         "9000 tokens, 8192 at most"),
        ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
         "5000 tokens, prompt and answer together, of a server that takes 4096"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_long_is_told_by_its_figures(line: str, figures: str) -> None:
    found = explain(f"ValueError: {line}")
    assert found.kind == "request_rejected"
    assert figures in found.what
    assert not any("base64" in why for why in found.why)


def test_a_divisor_of_the_heads_is_named() -> None:
    found = explain(LEARNED[0][1])
    assert any("e.g. 4" in one for one in found.changes)


def test_words_before_another_exception_are_no_event() -> None:
    words = "the model `x` does not exist here, and the default chat template is no longer allowed"
    unknown = "Traceback (most recent call last):\nZeroDivisionError: division by zero\n"
    assert explain(f"{words}\n{unknown}").kind == "unknown"
    assert message(explain(words)) == "no_chat_template"


def test_an_error_that_nobody_knows_goes_before_what_its_parent_says() -> None:
    parent = "RuntimeError: Engine core initialization failed. See root cause above."
    found = explain(f"ZeroDivisionError: division by zero\n{parent}\n")
    assert found.kind == "unknown"
    assert "ZeroDivisionError" in found.what
    assert message(explain(parent)) == "engine_gone"


REFUSED = (
    'Traceback (most recent call last):\n  File "/v/vllm/config.py", line 1, in f\n'
    "ValueError: this quantization is not supported"
)


@pytest.mark.parametrize("before", [False, True])
def test_a_cause_goes_before_what_a_check_says_by_its_form(before: bool) -> None:
    cause = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    lines = (REFUSED, cause) if before else (cause, REFUSED)
    assert message(explain(REFUSED)) == "unsupported_feature"
    assert explain("\n".join(lines)).kind == "out_of_memory"


def test_an_unknown_error_after_a_check_goes_before_it() -> None:
    found = explain(f"{REFUSED}\nZeroDivisionError: division by zero\n")
    assert found.kind == "unknown"
    assert found.also == ("line 3: ValueError: this quantization is not supported",)


DRIVER = (
    "/venv/torch/cuda/__init__.py:129: UserWarning: CUDA initialization: The NVIDIA driver on your"
    " system is too old (found version 11040).\n"
)


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("unknown", f"{DRIVER}ValueError: another thing\n"),
        ("driver_too_old", f"{DRIVER}RuntimeError: Failed to infer device type\n"),
        (
            "unknown",
            "2025-03-19 - lmdeploy - WARNING - Fallback to pytorch engine because `/m` not"
            " supported by turbomind engine.\nRuntimeError: another thing\n",
        ),
        (
            "request_rejected",
            "ERROR Error in preprocessing prompt inputs\n"
            "ValueError: At most 1 image(s) may be provided in one request.\n",
        ),
        ("interrupted", "KeyboardInterrupt\nAborted (core dumped)\n"),
    ],
)
def test_what_a_run_outlived_or_a_client_wrote_is_no_cause(kind: str, log: str) -> None:
    assert explain(log).kind == kind


def test_versions_of_the_log_prove_what_the_message_leaves_open() -> None:
    line = "RuntimeError: Can not found rewrite for architectures: ['Qwen2_5_VLForConditional"
    line += "Generation']"
    old = explain(f"lmdeploy==0.7.1\n{line}\n")
    assert (old.kind, old.others) == ("unsupported_model", None)
    assert "0.7.2 or newer" in old.changes[0]
    assert explain(f"lmdeploy==0.9.0\n{line}\n").kind == "unknown"


def test_a_command_that_stands_in_the_log_is_not_asked_for() -> None:
    line = "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"
    assert any("command that was run" in one for one in explain(line).send)
    given = explain(f"$ lmdeploy serve api_server /m\n{line}\n")
    assert not any("command that was run" in one for one in given.send)


def test_advice_of_another_program_is_left_out() -> None:
    line = "AttributeError: 'Qwen2MoeConfig' object has no attribute 'mlp_only_layers'"
    of_vllm = tried(explain(f"INFO api_server.py:585] vLLM API server version 0.6.4\n{line}\n"))
    assert of_vllm
    assert not any("lmdeploy" in one for one in of_vllm)
    assert any("lmdeploy" in one for one in tried(explain(f"lmdeploy serve\n{line}\n")))


def test_a_utilization_is_advised_once() -> None:
    found = explain(VLLM.format("24.00", "14.00", "-0.50"))
    assert sum("gpu-memory-utilization" in one for one in found.changes) == 1
    beyond = explain(VLLM.format("12.00", "14.00", "-9.00"))
    assert not any("gpu-memory-utilization" in one for one in beyond.changes)


def test_a_warning_of_python_of_two_lines_is_no_cause() -> None:
    found = explain(
        "/w/vllm/connections.py:8: RuntimeWarning: Failed to read commit hash:\nNo module named"
        " 'vllm.commit_id'\nImportError: cannot import name '_C' from 'vllm' (unknown location)\n"
    )
    assert (message(found), found.also) == ("missing_extension", ())
    assert [one.line for one in found.evidence] == [3]
    quoted = "/x.py:3: UserWarning: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert explain(f"{quoted}\nZeroDivisionError: division by zero\n").kind == "unknown"


def test_rows_use_figures_and_groups_that_exist() -> None:
    rows: Any = load_yaml(presets_dir() / "causes.yaml")
    facts = {name for row in rows["facts"] for name in re.compile(row["pattern"]).groupindex}
    for cause in causes():
        groups = re.compile(cause.pattern).groupindex
        # A figure would hide the group; the card's `arch` is the line's where it has one.
        assert not (set(groups) & set(FIGURES)) - {"arch"}, cause.what
        for text in (cause.what, *cause.why, *cause.possible, *cause.change, *cause.unknown):
            named = {name for name in re.findall(r"\{(\w+)\}", text) if not name.isdigit()}
            assert named <= {*groups, *FIGURES, *facts}, cause.what
        assert set(cause.when) <= {*groups, *FIGURES, *facts, "communicator"}, cause.what
        assert cause.source or cause.kind, cause.what
    assert len(FIGURES) <= 21


@pytest.mark.parametrize(
    "line",
    [
        "2025-06-01 10:00:05,000 INFO retry ok, 0 requests failed",
        "2025-06-01 10:00:00 - lmdeploy - WARNING - retry: connection refused, trying again",
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54.14",
    ],
)
def test_a_line_that_a_program_outlived_is_not_the_last_error(line: str) -> None:
    assert not explain(f"{line}\n").evidence


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


def test_a_docker_run_with_gpus_leaves_the_driver_s_age() -> None:
    error = "RuntimeError: CUDA driver version is insufficient for CUDA runtime version\n"
    bare = explain(f"docker run -it ubuntu bash\n{error}")
    given = explain("docker run \\\n  --gpus all \\\n  img\ndocker run -d redis\n" + error)
    assert (message(bare), message(given)) == ("container_without_gpu", "driver_too_old")


def test_a_card_without_bfloat16_is_older_than_the_build() -> None:
    found, plain = (
        explain("lmdeploy: Device does not support bf16.\n" + NO_KERNEL),
        explain(NO_KERNEL),
    )
    assert "older" in some(found.others).had[0]
    assert "newer" in some(plain.others).had[0]


RAISED = '  File "/v/site-packages/{}", line 9, in {}\n    {}\n'


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("wrong_setting", "AssertionError: the model format should be in ['hf', 'awq']"),
        ("no_kernel_image",
         "RuntimeError: [TM][ERROR] CUDA runtime error: invalid device function /w/a.cu:9"),
        ("incomplete_checkpoint", "ValueError: Unrecognized configuration class <class"
         " 'a.b.NewConfig'> to build an AutoTokenizer."),
        ("check_failed", "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"),
        ("unsupported_model", "2026-03-02 11:00:01,1 - lmdeploy - ERROR - Engine loop failed with"
         " error: MoonV.forward() missing 1 required positional argument: 'moon'"),
        ("container_without_gpu",
         "docker: Error response from daemon: Unknown runtime specified nvidia."),
        ("nccl_error", "h:9:9 [0] transport/net_ib.cc:9 NCCL WARN NET/IB : Got completion with"
         " error 12, opcode 0"),
        ("file_missing", "FileNotFoundError: [Errno 2] No such file or directory: './w/a'"),
        ("missing_package", "ModuleNotFoundError: No module named 'vllm.moons.input"),
        ("wrong_quantization", "RuntimeError: Currently, quantification and calibration of MoonText"
         " are not supported."),
        ("wrong_dtype", "AssertionError: Input and cos/sin must have the same dtype, got torch"),
        ("no_gpu", "ImportError: libcuda.so.1: cannot open shared object file: No such file"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_message_that_several_causes_share_is_unknown_with_a_list(kind: str, line: str) -> None:
    found = explain(f"$ lmdeploy serve api_server /m/a\n{line}\n")
    assert (found.kind, found.phase, found.changes) == ("unknown", "unknown", ())
    assert not found.known
    assert found.what == f"turbofit does not know the cause from this log: {line.strip()}"
    assert some(found.others).message == kind
    assert len(some(found.others).had) > 1
    assert some(found.others).tried
    assert found.send
    assert found.unknown[0] == "what caused it"


def test_a_value_that_the_log_itself_has_comes_first() -> None:
    line = "[TM][ERROR]  Assertion fail: /w/src/turbomind/python/bind.cpp:9"
    found = explain(f"$ lmdeploy serve api_server /m/Moon-7B-AWQ-G32\n{line}\n")
    assert some(found.others).had[0].startswith("groups of 32, by the name in the log")
    line = "AssertionError: the model format should be in ['hf', 'awq']"
    found = explain(f"$ lmdeploy convert moon-7b /m/moon ./out\n{line}\n")
    assert some(found.others).had[0].startswith("the command gives ./out by position")


def test_a_sentence_that_a_program_failed_to_print_is_its_answer() -> None:
    asked = "raise MoonError('Please set model_name.')"
    trace = RAISED.format("lmdeploy/serve/async_engine.py", "_build", asked)
    error = "TypeError: __init__() missing 1 required positional argument: 'message'\n"
    found = explain(f"Traceback (most recent call last):\n{trace}{error}")
    assert (found.kind, found.others) == ("wrong_setting", None)
    assert "Please set model_name." in found.what
    # The sentence of another line is not what this one failed to print.
    earlier = trace.replace("_build", "_before") + "MoonError: Please set model_name.\n"
    later = "Traceback (most recent call last):\n" + trace.replace(asked, "f()") + error
    assert "refused" not in explain(f"Traceback (most recent call last):\n{earlier}{later}").what
    other = explain(f"Traceback (most recent call last):\n{trace.replace(asked, 'f()')}{error}")
    assert message(other) == "package_versions"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("unknown_option", "lmdeploy serve: error: argument {api_server,proxy}: invalid choice:"
         " 'gradio' (choose from 'api_server', 'proxy')"),
        ("weights_mismatch", "AttributeError: Can't get attribute 'TrainingArguments' on <module"
         " '__main__' from '/v/bin/lmdeploy'>"),
        ("file_missing", "Exception: Invalid repo_id: moon, must be of format namespace/name"),
        ("rendezvous", "ValueError: Error initializing torch.distributed using env:// rendezvous:"
         " environment variable RANK expected, but not set"),
        ("tp_impossible", "assert tensor.shape[split_dim] % tp == 0"),
        ("wrong_quantization", 'model format is "gptq" but group_size is 32.'),
        ("no_bfloat16", "ValueError: Bfloat16 is only supported on GPUs with compute capability of"
         " at least 8.0. Your Tesla T4 GPU has compute capability 7.5."),
    ],
)  # fmt: skip
def test_a_message_that_tells_its_cause_has_no_list(kind: str, line: str) -> None:
    found = explain(f"$ lmdeploy serve api_server /m/a\n{line}\n")
    assert (found.kind, found.others) == (kind, None)
