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
    assert tried(found) == ('pip install "transformers<5", or "transformers>=5.21.1"',)
    assert explain(f"{TRACE}RuntimeError: {error}\n").others is None


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
