"""``turbofit merge`` as it is typed."""

from __future__ import annotations

import json
import os
import signal

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

from tests.model.merge.cases import GOLDEN, digest, load, make_adapter, make_base
from turbofit.cli.main import main


@pytest.fixture
def folders(tmp_path):
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "lora")
    return [str(tmp_path / name) for name in ("base", "lora", "out")]


def test_a_merge_as_text_and_as_json(folders, tmp_path, capsys):
    assert main(["merge", *folders]) == 0
    captured = capsys.readouterr()
    assert "4 modules merged" in captured.out
    assert f"turbofit plan {folders[2]}" in captured.out.replace("\n", " ").replace("  ", " ")
    assert "writing model-00002-of-00002.safetensors (2 of 2)" in captured.err
    assert digest(load(tmp_path / "out")) == GOLDEN["bf16"]
    assert main(["merge", *folders]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", "--force", "--json", *folders]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["loras"], document["converted"]) == (4, False)
    assert document["out"] == folders[2]


def test_wrong_use(folders, tmp_path, monkeypatch, capsys):
    assert main(["merge", folders[0]]) == 2
    assert "BASE [ADAPTER] OUT" in capsys.readouterr().err
    assert main(["merge", folders[0], folders[2]]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main(["merge", folders[0], "internvl2-8b", folders[2]]) == 2
    assert "internvl2-8b is a model, and no LoRA" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    make_adapter(tmp_path / "internvl2-8b")  # a LoRA that is called as its base is
    assert main(["merge", folders[0], "internvl2-8b", folders[2]]) == 0
    capsys.readouterr()
    assert main(["merge", "no/such-base", *folders[1:], "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["hint"] == "hf download no/such-base, or name a folder with config.json"


def test_ended_by_a_signal(folders, tmp_path, monkeypatch):
    from turbofit.model.merge import files

    monkeypatch.setattr(files, "_write", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["merge", *folders]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_base_by_its_address_and_by_its_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for base, right in (
        ("https://huggingface.co/org/name/tree/v1", "hf download org/name --revision v1"),
        ("llava-1.5-7b", "hf download llava-hf/llava-1.5-7b-hf"),
    ):
        assert main(["merge", base, "lora", str(tmp_path / "out")]) == 2
        hint = capsys.readouterr().err.splitlines()[-1]
        assert hint == f"hint: {right}, or name a folder with config.json"
