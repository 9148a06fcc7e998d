"""A person's own words on a crash are told so; a program's line is read wherever it stands."""

from __future__ import annotations

import pytest
import yaml

import turbofit
from tests.logs.conftest import LOGS
from turbofit.core.errors import UsageError

EXAMPLES = yaml.safe_load((LOGS.parent / "rules" / "examples.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "InternVL2-4B, lmdeploy, two 3090, tp=2: first picture gives CUDA out of memory",
        "I get an error when loading the model",
        "my server dies when I send a picture",
        "InternVL2-8B on two 4090 runs out of memory, why?",
        "it hangs after the second request",
        "\u663e\u5b58\u4e0d\u591f \u542f\u52a8\u4e0d\u4e86",
        "\u53d1\u9001\u56fe\u7247\uff0c\u670d\u52a1\u5d29\u6e83",
    ],
)
def test_sentences_are_told_so_with_no_kind_and_no_cause(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        turbofit.diagnose(text)
    assert caught.value.message.startswith("this describes a crash")
    assert "the last 100 lines" in caught.value.hint
    model = "InternVL2-4B" if "4B" in text else "InternVL2-8B" if "8B" in text else "MODEL"
    assert f"turbofit plan {model}" in caught.value.hint.replace("OpenGVLab/", "")


def test_an_empty_text_describes_nothing() -> None:
    with pytest.raises(UsageError, match="the log is empty"):
        turbofit.diagnose(" ")


TEXTS = [text if isinstance(text, str) else "\n".join(text) for _, text, *_ in EXAMPLES]


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text.split()) > 1])
def test_a_programs_line_is_read(text: str) -> None:
    assert turbofit.diagnose(text).kind != ""


@pytest.mark.parametrize(
    "text",
    [
        "InternVL2-2B on an A10G: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a"
        " total capacity of 21.99 GiB of which 3.06 MiB is free.",
        "CUDA out of memory", "Segmentation fault (core dumped)", "worker.py: Killed\n",
        "torch.OutOfMemoryError: CUDA out of memory.",
    ],
)  # fmt: skip
def test_a_line_alone_is_one(text: str) -> None:
    assert turbofit.diagnose(f" {text} ").kind != ""


@pytest.mark.parametrize("log", sorted(LOGS.glob("*.log")), ids=lambda path: path.stem)
def test_a_pasted_log_is_a_log(log) -> None:
    assert turbofit.diagnose(log.read_text(encoding="utf-8", errors="replace")).kind
