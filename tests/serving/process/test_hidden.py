from __future__ import annotations

import shlex

import pytest

from turbofit.serving.process.hidden import hide_secrets, without_secrets


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("lmdeploy serve 'a model' --tp 2", "lmdeploy serve 'a model' --tp 2"),
        ("x --api-keys k1 k2 --tp 2", "x --api-keys *** *** --tp 2"),
        ("x --api-keys=k1 k2", "x --api-keys=*** ***"),
        ("x --api-key k1 model", "x --api-key *** model"),
        ("x --api-key -k1- --tp 2", "x --api-key *** --tp 2"),
        ("x --api_key=k=1 -- --api-k k1", "x --api_key=*** -- --api-k ***"),
        ("x --upstream-key k1 --hf-token k1", "x --upstream-key *** --hf-token ***"),
        ("HF_TOKEN=k1 x", "HF_TOKEN=*** x"),
        ("x --api-key-file keys --ssl-keyfile f", "x --api-key-file keys --ssl-keyfile f"),
        ("x --max-tokens 8k --token-num 9", "x --max-tokens 8k --token-num 9"),
        ("x --max-tokens 8k in out", "x --max-tokens 8k in out"),
        ("x --max-tokens=8k in", "x --max-tokens=8k in"),
        ("x --auth-tokens k1 2 k3 -q", "x --auth-tokens *** *** *** -q"),
        ("HF_TOKENS=k1 x", "HF_TOKENS=*** x"),
        ("x --api-keys 123456 7", "x --api-keys *** ***"),
        ("x --api-key 123456", "x --api-key ***"),
        ("x http://me:k1@host/v1", "x http://***@host/v1"),
        ("'l serve m --api-keys k1 --tp 2' -q", "'l serve m --api-keys *** --tp 2' -q"),
        ("diagnose 'too many tokens in it'", "diagnose 'too many tokens in it'"),
        ("curl -H 'Authorization: Bearer k1'", "curl -H 'Authorization: Bearer ***'"),
        ("""-d '{"api_key": "k1"}'""", """-d '{"api_key": ***'"""),
    ],
)  # fmt: skip
def test_a_command_is_shown_without_secrets(line: str, shown: str) -> None:
    assert " ".join(without_secrets(shlex.split(line))) == " ".join(shlex.split(shown))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("batch in out --prompt 'Is MARK ill?' --url u", "batch in out --prompt *** --url u"),
        ("chat --system=MARK --max-tokens 8", "chat --system=*** --max-tokens 8"),
        (
            """serve m --default-chat-template-kwargs '{"name": "MARK"}' --tp 2""",
            "serve m --default-chat-template-kwargs *** --tp 2",
        ),
    ],
)
def test_what_somebody_writes_for_a_model_is_hidden_where_it_is_asked(
    line: str, shown: str
) -> None:
    words = shlex.split(line)
    assert " ".join(without_secrets(words, texts=True)) == shown
    assert without_secrets(words) == words  # a command to paste has it
    assert "MARK" not in hide_secrets(f"{words}", words, {})


def test_a_text_loses_what_is_secret_on_its_command_line_and_in_its_environment() -> None:
    text = "open(sk-long-1) env-1 (env-2) hf_xyz http://u:pass@h x"
    environ = {
        "TURBOFIT_API_KEYS": "env-1, env-2",
        "HF_TOKEN": "hf_xyz",
        "HOME": "open",
        "A_KEY": "x",
    }
    hidden = hide_secrets(text, ["serve", "--api-key", "sk-long-1"], environ)
    assert hidden == "open(***) *** (***) *** http://***@h x"
    assert hide_secrets("a key-1 b", ["serve --api-key 'key-1' m"], {}) == "a *** b"
