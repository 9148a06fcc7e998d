"""Packages that do not go together: cause and the line that mends it."""

from __future__ import annotations

import pytest

from tests.diagnose.conftest import explain, message, tried

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
        ("AttributeError: 'NoneType' object has no attribute 'image_processor'", "AutoProcessor"),
        ("ImportError: cannot import name 'AutoModelForVision2Seq' from 'transformers' (/x)",
         'pip install "transformers<5"'),
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


def test_llava_1_5_with_transformers_5() -> None:
    """What LMDeploy 0.18 and Transformers 5.17 say of a picture of 40 x 30."""
    error = (
        "The size of tensor a (30) must match the size of tensor b (3) at non-singleton dimension 1"
    )
    trace = (
        TRACE
        + frame("lmdeploy/vl/model/llava_hf.py", "preprocess", "self.processor(image)")
        + frame("torchvision/transforms/v2/functional/_misc.py", "normalize_image")
    )
    found = explain(f"{trace}RuntimeError: {error}\n")
    assert message(found) == "package_versions"
    assert tried(found) == (
        "pip install 'transformers>=5.21.1' or pip install 'transformers<5': with these LMDeploy"
        " 0.18 runs this model",
    )
    of_015 = explain(f"$ pip install lmdeploy==0.15.0\n{trace}RuntimeError: {error}\n")
    assert tried(of_015) == ('pip install "transformers<5"',)  # not in the table
    assert explain(f"{TRACE}RuntimeError: {error}\n").others is None


SERVED = "$ lmdeploy serve api_server {}\n"


@pytest.mark.parametrize(
    ("model", "error", "mends"),
    [
        # The checkpoint's own configuration code fails up to 5.19.0.
        ("OpenGVLab/InternVL2-8B",
         "AttributeError: 'dict' object has no attribute 'num_hidden_layers'",
         "pip install 'transformers>=5.20.2': with these LMDeploy 0.18 runs InternVL2-8B"),
        # Only versions fail that LMDeploy's metadata exclude.
        ("OpenGVLab/InternVL2-8B",
         "ImportError: cannot import name 'GptOssConfig' from 'transformers' (/x)",
         "pip install 'transformers>=4.56.2': with these LMDeploy 0.18 runs InternVL2-8B"),
        # None runs it.
        ("llava-hf/llava-v1.6-vicuna-7b-hf",
         TRACE + frame("lmdeploy/vl/model/llava_next.py", "build_model") +
         "TypeError: LlavaNextForConditionalGeneration.__init__() got an unexpected keyword"
         " argument 'trust_remote_code'",
         "turbofit serve --engine transformers: LMDeploy 0.18 fails at its start"
         " (LLaVA-v1.6-Vicuna-7B), whichever version of Transformers was tried"),
    ],
)  # fmt: skip
def test_the_table_of_tried_versions_says_what_runs(model: str, error: str, mends: str) -> None:
    found = explain(SERVED.format(model) + error + "\n")
    assert message(found) == "package_versions"
    assert tried(found)[-1] == mends
    assert not any("<4.52" in change for change in tried(found))


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
