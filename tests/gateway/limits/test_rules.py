"""The rules of single fields: what is brought into its range, and what is refused."""

from __future__ import annotations

import pytest

from tests.gateway.limits.test_ranges import EMPTY, in_range, refused


@pytest.mark.parametrize(
    ("kind", "name", "asked", "given", "notes"),
    [
        ("chat", "top_k", 1025, 1024, ["top_k=1025->1024"]),
        ("generate", "top_k", 2**63, 1024, ["top_k=9223372036854775808->1024"]),
        ("messages", "top_k", 10**30, 1024, ["top_k=huge->1024"]),
        ("generate", "repetition_ngram_size", 1025, 1024, ["repetition_ngram_size=1025->1024"]),
        ("chat", "repetition_ngram_size", 1024, 1024, []),
        ("chat", "n", 3.0, 3, []),
        ("completions", "n", True, 1, []),
        ("chat", "seed", -1, 2**64 - 1, ["seed=-1->18446744073709551615"]),
        ("chat", "seed", 2**64, 0, ["seed=huge->0"]),
        ("chat", "min_new_tokens", 2**31, 4096, ["min_new_tokens=2147483648->4096"]),
        ("chat", "max_tokens", 64000, 4096, ["max_tokens=64000->4096"]),
        ("responses", "max_output_tokens", 10**30, 4096, ["max_output_tokens=huge->4096"]),
        ("chat", "temperature", 1e-300, 0.01, ["temperature=1e-300->0.01"]),
        ("chat", "temperature", "0.5", 0.5, []),
        ("chat", "temperature", 0, 0, []),  # greedy; a floor would sample
        ("messages", "temperature", 0.0, 0.0, []),
        ("chat", "presence_penalty", 9, 2, ["presence_penalty=9->2"]),
        # LMDeploy's own tests send 1e-7.
        ("chat", "repetition_penalty", 1e-7, 0.01, ["repetition_penalty=1e-07->0.01"]),
        ("generate", "top_logprobs_num", 5000, 1024, ["top_logprobs_num=5000->1024"]),
        ("generate", "stop_token_ids", [0, 511], [0, 511], []),
        ("chat", "logit_bias", {"5": 300, "6": -1}, {"5": 100, "6": -1}, []),
        ("chat", "stream", "yes", True, []),
        ("chat", "ignore_eos", 0, False, []),
    ],
)  # fmt: skip
def test_what_can_be_brought_into_its_range_is_and_is_said(kind, name, asked, given, notes) -> None:
    body, words = in_range(kind, **{name: asked})
    assert (body[name], words) == (given, notes)
    assert type(body[name]) is type(given) or not isinstance(given, int)


@pytest.mark.parametrize(
    ("kind", "name", "asked", "word"),
    [
        ("chat", "top_k", -1, "between 0 and 1024"),
        ("chat", "n", 0, "between 1 and 2147483647"),
        ("completions", "n", 2**40, "between 1 and 2147483647"),
        ("chat", "n", 1.5, "no whole number"),
        ("chat", "top_k", "x", "is x, no whole number"),
        ("chat", "top_k", [1], "no whole number"),
        ("chat", "temperature", 2.01, "at most 2"),
        ("messages", "temperature", 1.01, "at most 1"),
        ("chat", "temperature", "nan", "no finite number"),
        ("chat", "top_p", 0, "above 0"),
        ("completions", "min_p", 2, "at most 1"),
        ("generate", "min_p", -0.1, "at least 0"),
        ("chat", "max_tokens", 0, "between 1 and 4096"),
        ("chat", "top_logprobs", 21, "between 0 and 20"),
        ("completions", "logprobs", 1, "is not taken here"),
        ("completions", "prompt", "", "is empty"),
        ("completions", "prompt", ["a", ""], "is empty"),
        ("generate", "stop_token_ids", [-1], "token id -1, ids are between 0 and 511"),
        ("generate", "stop_token_ids", list(range(33)), "33 token ids, the limit is 32"),
        ("generate", "stop_token_ids", "12", "no list"),
        ("chat", "input_ids", [10**9], "ids are between 0 and 511"),
        ("chat", "input_ids", [1] * 4097, "4097 token ids, the limit is 4096"),
        ("chat", "logit_bias", {"512": 1}, "ids are between 0 and 511"),
        ("chat", "logit_bias", {"1": "nan"}, "no finite number"),
        ("chat", "logit_bias", [1], "no object"),
        ("chat", "stop", "", "is empty"),
        ("chat", "stop", "x" * 1025, "1025 characters, the limit is 1024"),
        ("chat", "stop", [f"stop{i}" for i in range(17)], "17 strings, the limit is 16"),
        ("chat", "stop", list("abcde"), "5 strings of less than 3 characters, the limit is 4"),
        ("chat", "stop", [1], "no string"),
        ("chat", "stream", "maybe", "neither true nor false"),
        ("chat", "model", 7, "no string"),
        ("chat", "user", "x" * 5000, "5000 characters"),
        ("responses", "include", ["x"] * 257, "257 items, the limit is 256"),
        ("messages", "metadata", {str(n): n for n in range(300)}, "300 items"),
        ("chat", "chat_template_kwargs", {"chat_template": "{{ x }}"}, "may not set"),
        ("responses", "input", [{"role": "user", "content": "x"}] * 4097, "4097 messages"),
        ("chat", "messages", [{"role": "user", "content": [EMPTY] * 8193}], "8193 parts"),
        ("chat", "tools", [{}] * 129, "129 tools"),
        ("responses", "input", ["x"], "no object"),
    ],
)
def test_what_cannot_is_refused_with_the_range(kind, name, asked, word) -> None:
    refusal = refused(kind, **{name: asked})
    assert refusal.param == name
    assert word in refusal.message
