"""Lines that people paste: the program in them, and what stands around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbofit.core.shell_line import SERVER, read_line

LINE = "lmdeploy serve api_server m --tp 2"


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        (LINE, []),
        (f"nohup {LINE} > a.log 2>&1 &", ["nohup", "> a.log 2>&1 &"]),
        (f"time sudo {LINE} 2>a.log| tee b", ["time sudo", "2>a.log | tee ..."]),
        (f"cd /m && export HF_A=0,1; {LINE}; echo", ["cd ...", "; echo"]),
        (f"set HF_A=0,1 && {LINE} # two cards", ["# ..."]),
        (f"$env:HF_A='0,1'; {LINE}", []),
        (f"docker run -p 1:1 -e HF_A=0,1 o/lmdeploy {LINE}", ["docker run ..."]),
        (f'docker run x sh -c "HF_A=0,1 {LINE}"', ["docker run ..."]),
        (f"nohup sh -c '{LINE}' &", ["nohup sh ...", "&"]),
        (f"sshpass -p hunter2 {LINE}; curl -H 'X: sk-1' <<< k", ["sshpass ...", "; curl ..."]),
        (rf'"C:\Program Files\Py\{LINE.replace(" ", ".exe" + chr(34) + " ", 1)}', []),
        ("HF_A=0,1 /opt/bin/lmdeploy serve api_server m \\\n  --tp '2'", []),
        ("lmdeploy serve api_server m \\ \n --tp 2\n", []),
        ("# a server\nlmdeploy serve api_server m\n --tp 2\necho", ["# ...", "; echo"]),
        (f"({LINE})", []),
        (f"`{LINE}`", []),
        (f"\u201c{LINE}\u201d", []),
        ("lmdeploy.exe serve api_server m ^\r\n --tp 2", []),
        ("python3 -m lmdeploy.serve.openai.api_server m --tp 2", []),
        ("python -m lmdeploy serve api_server m --tp 2", []),
    ],
)
def test_a_quoted_line_of_the_server(text: str, left_out: list[str]) -> None:
    line = read_line([text, "--on", "t4"])
    assert (line.of, line.words) == (SERVER, ["m", "--tp", "2", "--on", "t4"])
    assert line.left_out == left_out
    assert line.variables == ({"HF_A": "0,1"} if "A=" in text and "docker" not in text else {})
    assert read_line(["--on", "t4", text]).words == ["--on", "t4", "m", "--tp", "2"]


@pytest.mark.parametrize(
    ("word", "path"),
    [
        (r"D:\a\b-2_6", r"D:\a\b-2_6"),
        (r"..\models\b", r"..\models\b"),
        (r'"C:\My Models\b"', r"C:\My Models\b"),
        (r"/my\ models/b", "/my models/b"),
        ("'/my models/b'", "/my models/b"),
        (r'"{\"a\": 1}"', '{"a": 1}'),
        ("''", ""),
    ],
)
def test_a_word_is_what_the_shell_hands_on(word: str, path: str) -> None:
    assert read_line([f"lmdeploy serve api_server {word} --tp 2"]).words == [path, "--tp", "2"]


def test_a_typed_line_has_all_words_before_its_program() -> None:
    line = read_line(["nohup", "HF_A=1", *LINE.split(), "--on", "a; b", "--", "--x"])
    assert line.words == ["m", "--tp", "2", "--on", "a; b", "--", "--x"]
    assert (line.left_out, line.variables) == (["nohup"], {"HF_A": "1"})
    assert read_line(["api_server", "m"]).words == ["m"]
    assert read_line(["serve.json", "--on", "2x A6000", "--", *LINE.split()]) is None
    assert read_line(["m", "--model-name", "api_server", "--on", "vllm"]) is None
    assert read_line(["m", "--on", "t4", "--model-name", "vllm-openai"]) is None
    assert read_line(["models/llama-server", "--on", "t4"]) is None
    assert read_line(["llama-server", "-c", "8"]).of == "llama.cpp"


def test_variables_are_those_of_the_server_itself() -> None:
    line = read_line([f"HF_A=1 x; HF_B=2; export HF_C=3; PATH=/x:$PATH HF_D=$D HF_E=5 {LINE}"])
    assert line.variables == {"HF_C": "3", "HF_E": "5"}
    assert line.left_out == ["HF_A=... x ; HF_B=... ; PATH=... HF_D=..."]
    line = read_line([f"docker run -e HF_HOME=/root -e CUDA_VISIBLE_DEVICES=1 i {LINE}"])
    assert line.variables == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("vllm serve m", "vLLM"),
        ("python -m vllm.entrypoints.openai.api_server m", "vLLM"),
        ("docker run vllm/vllm-openai:latest m", "vLLM"),
        ("python -m sglang.launch_server m", "SGLang"),
        ("ollama run m", "Ollama"),
        ("CUDA_VISIBLE_DEVICES=0 swift deploy m", "ms-swift"),
        ("lmdeploy lite m", "lmdeploy lite"),
        ("lmdeploy serve gradio m", "lmdeploy serve gradio"),
    ],
)
def test_whose_line_it_is(text: str, of: str) -> None:
    for words in ([text], text.split()):
        line = read_line(words)
        assert (line.of, line.words) == (of, ["m"])


@given(st.text(alphabet="ab '\"\\<>|&;#2=$\n", max_size=30))
def test_no_text_breaks_it(text: str) -> None:
    for line in (f"{text} {LINE}", f"sh -c '{text}' {LINE}"):
        read_line([line])
    assert read_line([f"{LINE} {text}"]).words[:3] == ["m", "--tp", "2"]
