"""Packages that do not go together: cause and the line that mends it."""

from __future__ import annotations

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
    assert some(found.others).had[0].startswith("the installed transformers is older or newer")
    assert tried(found)[0].startswith("a newer LMDeploy, whose own file asks here")
    of_another = explain(f"{TRACE}{frame('outlines/x.py', '<module>')}{error}\n")
    assert tried(of_another)[0].startswith("the version of transformers")
