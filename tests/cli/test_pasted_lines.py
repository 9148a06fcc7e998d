"""Lines that start LMDeploy in other ways than its server."""

from __future__ import annotations

import pytest

from turbofit.cli.pasted_lines import pasted_line
from turbofit.cli.words import Typed, read
from turbofit.core.errors import UsageError
from turbofit.serving.passthrough import refused_options, together


class One:
    """An option with one value."""

    bare = several = False


OPTIONS = dict.fromkeys(
    ("--tp", "--engine", "--session-len", "--quant-policy", "--cache-max-entry-count",
     "--model-format", "--max-batch-size"),
    One(),
)  # fmt: skip


def typed(line: str) -> Typed:
    return read([line, "--tp", "1"], OPTIONS, plans=True, serves=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lmdeploy chat ./m-4bit --model-format awq --max-batch-size 1",
         "./m-4bit --model-format awq --max-batch-size 1"),
        ("lmdeploy serve gradio m --session-len 2048", "m --session-len 2048"),
        ("CUDA_VISIBLE_DEVICES=0 /opt/bin/lmdeploy serve api_server m", "m"),
        ("pipe = pipeline('m', backend_config=TurbomindEngineConfig(session_len=8,"
         " quant_policy=8, model_format='awq'))",
         "m --engine turbomind --session-len 8 --quant-policy 8 --model-format awq"),
        ("cfg = PytorchEngineConfig(cache_max_entry_count=0.4)\np = lmdeploy.pipeline('m', cfg)",
         "m --engine pytorch --cache-max-entry-count 0.4"),
        ("TurbomindEngineConfig(session_len=8)", "--engine turbomind --session-len 8"),
        ("swift deploy --model m --infer_backend lmdeploy --lmdeploy_session_len 9 --port 1",
         "m --session-len 9"),
        ("swift infer --model_type m --infer_backend=lmdeploy --quant_policy 4",
         "m --quant-policy 4"),
    ],
)  # fmt: skip
def test_a_line_becomes_the_words_of_lmdeploy_s_server(line: str, words: str) -> None:
    assert sorted(typed(line).words) == sorted([*words.split(), "--tp", "1"])


@pytest.mark.parametrize(
    "line",
    [
        "moontool run m --tp 4",
        "swift infer --model m --infer_backend vllm",
        "swift infer --model m",
        "pipeline(path, backend_config=c)",
        "pipeline('m', backend_config=TurbomindEngineConfig(tp=1)",
    ],
)
def test_another_line_is_refused_with_what_is_read(line: str) -> None:
    with pytest.raises(UsageError):
        typed(line)


def test_what_is_no_constant_is_left_out_and_said() -> None:
    assert typed("pipeline('m', TurbomindEngineConfig(session_len=n))").notes[0] == (
        "left out: session_len=n"
    )


def test_a_model_s_name_is_no_line() -> None:
    assert pasted_line("OpenGVLab/InternVL3-8B") is None


def test_refusals_of_one_line_come_together() -> None:
    words = ["--proxy-url", "http://x", "--num-tokens-per-iter", "8"]
    error = together(refused_options(words))
    assert "--proxy-url" in error.message
    assert "--num-tokens-per-iter" in error.message


def test_a_long_word_is_read_once() -> None:
    """A pattern that begins with "as many characters as there are" took the square of 100,000."""
    assert pasted_line("[" * 1_000_000) is None
    assert pasted_line(f"/opt/{'x' * 1000}/swift infer --model a --infer_backend lmdeploy")
