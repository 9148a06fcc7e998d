"""What a log says of its run: model, options, facts."""

from __future__ import annotations

import pytest

from turbofit.logs.log_reader import form_of
from turbofit.logs.subject import Subject, may_be_fact


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("lmdeploy serve api_server OpenGVLab/InternVL2-8B --tp 4", "internvl2-8b"),
        ("pipe = pipeline('/data/models/Qwen2-VL-7B-Instruct/')", "qwen2-vl-7b"),
        ("--model-path liuhaotian/llava-v1.5-7b", "llava-1.5-7b"),
        ("running InternVL2_26B-AWQ today", "internvl2-26b-awq"),
        ("import modeling_llama", None),
    ],
)
def test_models_that_logs_name(text: str, model: str | None) -> None:
    subject = Subject()
    subject.read(1, text, form_of(text))
    assert subject.model == model


def test_a_command_goes_before_a_mention() -> None:
    subject = Subject()
    mention = "compared with Qwen2-VL-7B-Instruct"
    command = "lmdeploy serve api_server internvl2-8b --tp 2 --quant-policy 8 --dtype float16"
    for line, text in enumerate((mention, command), 1):
        subject.read(line, text, form_of(text))
    assert subject.model == "internvl2-8b"
    assert subject.options == {"tp": 2, "quant_policy": 8, "dtype": "float16"}


def test_a_fact_is_found_by_a_word_with_a_digit() -> None:
    """Lines are asked with zeros for their digits; the pattern is asked with the line."""
    subject, line = Subject(), "load InternVL-Int4-g32 now"
    assert may_be_fact(form_of(line).text)
    subject.read_facts(line)
    assert subject.facts == {"group_size": "32"}
