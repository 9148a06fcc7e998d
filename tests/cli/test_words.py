"""Words of a command line: turbofit's own, LMDeploy's, and a pasted line of its server."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbofit.cli.words import Typed, read
from turbofit.core.errors import UsageError


class One(NamedTuple):
    """An option with one value."""

    bare: bool = False
    several: bool = False


OPTIONS = {
    **dict.fromkeys(
        ["--on", "--host", "--port", "--api-key", "--engine", "--tp", "--max-batch-size",
         "--ssl-certfile", "--ssl-keyfile", "--cache-max-entry-count", "--model-name",
         "--max-concurrent-requests"],
        One(),
    ),
    **dict.fromkeys(["-q", "-v", "--enable-prefix-caching"], One(bare=True)),
    "--origins": One(several=True),
}  # fmt: skip
LINE = "lmdeploy serve api_server m --tp 2"


def typed(*words: str, serves: bool = True) -> Typed:
    return read(words, OPTIONS, plans=True, serves=serves)


@pytest.mark.parametrize(
    ("words", "ours", "passed"),
    [
        ("m --server-name=0.0.0.0 --server-port 80", "m --host 0.0.0.0 --port 80", ""),
        ("--api-keys A B --tp 2 m", "--api-key A --api-key B --tp 2 m", ""),
        ("m --api-keys", "m", ""),
        (
            "m --max_batch_size 4 --cache-max 0.5 --enable_prefix_caching",
            "m --max-batch-size 4 --cache-max-entry-count 0.5 --enable-prefix-caching",
            "",
        ),
        ("m --log-lev INFO --trust_remote_code", "m", "--log-level INFO --trust-remote-code"),
        ("m --backend pytorch --device cuda --ep 1", "m --engine pytorch", ""),
        ("m --device ascend --ep 2", "m", "--device ascend --ep 2"),
        ("m --vision-max-batch-size 8 --allow-methods GET POST", "m", ""),
        ("m --ssl", "m --ssl-certfile=c.pem --ssl-keyfile=k.pem", ""),
        ("-vq --origins a b --tp=-1 --origins c m", "-vq --tp=-1 m --origins c", None),
        ("--tp -1 --origins=a", "--tp -1 --origins a", ""),
    ],
)
def test_options_are_whose_they_are(words, ours, passed, monkeypatch) -> None:
    monkeypatch.setenv("SSL_CERTFILE", "c.pem")
    monkeypatch.setenv("SSL_KEYFILE", "k.pem")
    found = typed(*words.split())
    if passed is None:  # a list ends at the next option alone, and goes on where it is repeated
        listed = [word for value in "abcm" for word in ("--origins", value)]
        assert found.words == ["-vq", "--tp=-1", *listed]
    else:
        assert (" ".join(found.words), " ".join(found.passed)) == (ours, passed)
    assert not found.unknown


def test_what_became_of_each_option_is_one_line(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    words = (
        "m --server-port 1 --log-level INFO --chat-template x --nnodes 1 --tp 2 --download-dir d"
    )
    found = typed(*words.split())
    assert found.notes == [
        "as LMDeploy's: --server-port as --port; --log-level, --chat-template for the engine; "
        "--nnodes 1 left out: LMDeploy's own default; "
        "--download-dir as HF_HUB_CACHE and MODELSCOPE_CACHE"
    ]
    assert found.variables == {"HF_HUB_CACHE": "d", "MODELSCOPE_CACHE": "d"}
    assert os.environ["HF_HUB_CACHE"] == "before"  # nothing is set while words are read
    planned = read(["--server-port", "1", "--log-level", "INFO"], {"--tp": One()}, plans=True,
                   serves=False)  # fmt: skip
    assert planned.notes == ["as LMDeploy's: --server-port, --log-level without effect on the plan"]
    assert (planned.words, planned.passed) == ([], [])
    assert typed("m", "--tp", "2") == Typed(["m", "--tp", "2"], [], {}, [], [])


def test_what_nobody_knows_and_what_lacks_a_value() -> None:
    assert typed("m", "--foo", "1", "--a=b", "-tp").unknown == ["--foo", "--a", "-tp"]
    with pytest.raises(click.BadOptionUsage, match="--tp needs a value before --foo"):
        typed("--tp", "--foo")
    with pytest.raises(UsageError, match="--log-level needs a value"):
        typed("--log-level")
    with pytest.raises(UsageError, match="--on is given twice"):
        typed("--on", "a", "--on", "b")
    with pytest.raises(UsageError, match="ascend: turbofit plans CUDA GPUs alone"):
        typed("m", "--device", "ascend", serves=False)


@pytest.mark.parametrize(
    "line",
    [
        LINE,
        f"HF_A=0,1 {LINE}",
        "HF_A=0,1 /opt/bin/lmdeploy serve api_server m \\\n  --tp '2'",
        "lmdeploy serve api_server m \\ \n --tp 2\n",
        "python3 -m lmdeploy.serve.openai.api_server m --tp 2",
        "python -m lmdeploy.serve.api_server m --tp 2",
        "python -m lmdeploy serve api_server m --tp 2",
        "api_server m --tp 2",
    ],
)
def test_a_line_of_the_server_in_quotes_or_typed(line: str) -> None:
    variables = {"HF_A": "0,1"} if "HF_A" in line else {}
    for words in ([line], *([] if "\\" in line else [line.split()])):
        assert typed(*words, "--on", "t4") == Typed(
            ["m", "--tp", "2", "--on", "t4"], [], variables, [], [], in_place=True
        )
    assert typed("--on", "t4", line).words == ["--on", "t4", "m", "--tp", "2"]
    assert typed(f"{line} > a.log 2>&1 & disown").words == ["m", "--tp", "2"]


def test_what_else_stands_before_the_program_is_cut_off_and_said(monkeypatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    for before in ("nohup", "sshpass -p hunter2", "PATH=/x HF_D=$D", "cd /m &&"):
        found = typed(f"{before} CUDA_VISIBLE_DEVICES=1 {LINE}")
        assert (found.words, found.variables) == (["m", "--tp", "2"], {"CUDA_VISIBLE_DEVICES": "1"})
        assert found.notes == ["left out: other words before lmdeploy serve api_server"]
    assert typed("lmdeploy serve api_server $MODELS/m").words == ["/models/m"]
    with pytest.raises(UsageError, match="No closing quotation"):
        typed("lmdeploy serve api_server 'm")


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve m --tensor-parallel-size 2", "A=1 /opt/bin/vllm serve m --tp 2",
        "python -m vllm.entrypoints.openai.api_server --model m --tp 2",
        "sglang serve --model-path m --tp-size 2",
        "python3 -m sglang.launch_server --model-path=m --tp 2",
    ],
)  # fmt: skip
def test_a_line_of_other_servers_server_is_read_as_well_but_is_not_in_lmdeploys_place(
    line: str,
) -> None:
    for words in ([line], line.split()):
        found = typed(*words)
        assert (found.words, found.in_place) == (["m", "--tp", "2"], False)


@pytest.mark.parametrize(
    "words",
    [
        ["m", "--model-name", "api_server", "--on", "vllm"],
        ["--on", "t4", "lmdeploy", "serve", "api_server", "m"],
        ["models/api_server", "--on", "t4"],
    ],
)
def test_nothing_else_is_taken_for_a_line_of_the_server(words: list[str]) -> None:
    assert typed(*words).words == words


@given(st.lists(st.text(alphabet="ab-e 0='\"\\\n$", max_size=12), max_size=5))
def test_no_words_break_it(words: list[str]) -> None:
    with contextlib.suppress(UsageError, click.UsageError):
        typed(*words)
    with contextlib.suppress(UsageError, click.UsageError):
        typed(f"{' '.join(words)} {LINE} {' '.join(words)}")
