"""``turbofit merge`` as it is typed."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.model.merge.cases import GOLDEN, digest, load, make_adapter, make_base
from turbofit.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def folders(tmp_path):
    pytest.importorskip("safetensors.torch")
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "lora")
    return [str(tmp_path / name) for name in ("base", "lora", "out")]


def test_a_merge_as_text_and_as_json(folders, tmp_path, capsys):
    assert main(["merge", *folders]) == 0
    captured = capsys.readouterr()
    assert "4 modules merged" in captured.out
    assert f"turbofit plan {folders[2]}" in captured.out.replace("\n", " ").replace("  ", " ")
    assert digest(load(tmp_path / "out")) == GOLDEN["bf16"]
    assert main(["merge", *folders]) == 2
    assert "out exists" in capsys.readouterr().err
    assert main(["merge", "--json", *folders[:2], f"{folders[2]}-2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["loras"], document["converted"]) == (4, False)
    assert document["out"] == f"{folders[2]}-2"


def test_wrong_use(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    base, lora, out = folders
    download = "hint: hf download {}, or name a folder with config.json\n"
    for words, said in (
        ([base], "BASE [ADAPTER] OUT"),
        ([base, out], "nothing to do"),
        (["no/such-base", lora, out], download.format("no/such-base")),
        (
            ["https://huggingface.co/org/name/tree/v1", lora, out],
            download.format("org/name --revision v1"),
        ),
        (["llava-1.5-7b", lora, out], download.format("llava-hf/llava-1.5-7b-hf")),
    ):
        assert main(["merge", *words]) == 2
        assert said in capsys.readouterr().err
    make_adapter(tmp_path / "internvl2-8b")  # a LoRA that is called as its base is
    assert main(["merge", base, "internvl2-8b", out]) == 0


def test_ended_by_a_signal(folders, tmp_path, monkeypatch):
    from turbofit.model.merge import files

    monkeypatch.setattr(files.Piece, "made", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["merge", *folders]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]
    assert signal.getsignal(signal.SIGTERM) is before
