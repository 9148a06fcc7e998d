"""``turbofit quantize`` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.model.quantize.made import make_plain, packed_tensors, write_packed
from turbofit.cli.main import main

ON = ("--on", "1xrtx3090,ram=64GiB")


def test_what_it_takes_as_json_and_the_program_in_a_file(tmp_path, capsys) -> None:
    program = tmp_path / "quantize.py"
    assert main(["quantize", "llama-3.1-8b", *ON, "--json", "--out", str(program)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "turbofit.quantize/1"
    assert document["needs"]["card"] == sum(document["needs"]["card_terms"].values())
    assert document["program"] == program.read_text()
    assert main(["quantize", "llama-3.1-8b", *ON, "--out", "-"]) == 0
    assert capsys.readouterr().out == program.read_text()


def test_a_machine_that_is_too_small_is_exit_code_3(capsys) -> None:
    assert main(["quantize", "qwen2.5-vl-72b", *ON]) == 3
    shown = capsys.readouterr().out
    assert "lacks" in shown
    assert "llmcompressor==" in shown


def test_the_shown_commands_are_what_was_typed(tmp_path, capsys) -> None:
    program = str(tmp_path / "my.py")
    words = ["llama-3.1-8b", *ON, "--gpus", "0", "--samples", "own.jsonl", "--calib-samples", "9"]
    assert main(["quantize", *words, "--out", program]) == 0
    shown = capsys.readouterr().out
    assert f"turbofit quantize {' '.join(words)} --calib-seqlen 2048 --out {program}" in shown
    assert f"python {program}" in shown


def test_no_program_is_written_for_a_missing_folder(tmp_path, capsys) -> None:
    program = tmp_path / "quantize.py"
    assert main(["quantize", "/missing/llama-3.1-8b", *ON, "--out", str(program)]) == 2
    assert not program.exists()
    assert "/missing/llama-3.1-8b" in capsys.readouterr().err


def test_a_result_is_read_and_planned_and_a_damaged_one_is_not(tmp_path, capsys) -> None:
    pytest.importorskip("safetensors.torch")
    plain = make_plain(tmp_path / "m")
    out = write_packed(plain, tmp_path / "out")
    words = ["quantize", str(plain), *ON, "--json", "--read"]
    assert main([*words, str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reading"]["good"]
    assert document["plan"]["backend"]["name"] == "turbomind"
    tensors = packed_tensors(plain)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = float("inf")
    bad = write_packed(plain, tmp_path / "bad", tensors)
    assert main([*words, str(bad)]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["plan"] is None
    assert "model.layers.0.mlp.up_proj" in document["reading"]["problems"][0]
    assert main([*words, str(bad), "--out", "x.py"]) == 2


@pytest.mark.lmdeploy
@pytest.mark.skipif(find_spec("lmdeploy") is None, reason="no LMDeploy")
def test_lmdeploys_own_class_reads_the_same_bits(tmp_path) -> None:
    """TurboMind's library needs a driver, so the command runs on a pretend card."""
    plain = make_plain(tmp_path / "m")
    out = write_packed(plain, tmp_path / "out")
    turbofit = (sys.executable, "-m", "turbofit")
    words = (*turbofit, "pretend", "-q", "--on", "1xrtx3090", "--", *turbofit, "quantize")
    done = subprocess.run(
        [*words, str(plain), *ON, "--json", "--read", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reading"]["equal"] is True
