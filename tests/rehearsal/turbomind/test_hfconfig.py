"""What stands in for families' own code: LMDeploy's front ends read the stand-ins with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.oracles import picture, tokens_of
from turbofit.rehearsal.turbomind import hfconfig

pytestmark = pytest.mark.lmdeploy


def test_images_of_llava_are_read_as_transformers_5_21_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers 5.0 to 5.20 fail at each, and `serve --pretend` has to answer a picture."""
    front = pytest.importorskip("lmdeploy.vl.model.llava_hf").LlavaHfVisionModel
    monkeypatch.setattr(front, "build_preprocessor", front.build_preprocessor)
    folder = write_checkpoint("llava-1.5-7b", tmp_path / "llava-1.5-7b-hf")
    with pytest.raises(RuntimeError, match="must match the size"):
        tokens_of(folder, [(picture(8, 8), {})])
    hfconfig.infer_channels_of_llava()
    assert tokens_of(folder, [(picture(640, 480), {}), (picture(30, 90), {})]) == [576, 576]


@pytest.mark.parametrize(("name", "tokens"), [("cogvlm-17b", 1227), ("cogvlm2-19b", 2306)])
def test_cogvlm_needs_no_code_of_its_authors(name: str, tokens: int, tmp_path: Path) -> None:
    folder = write_checkpoint(name, tmp_path / name)
    assert not list(folder.glob("*.py"))
    assert tokens_of(folder, [(picture(640, 480), {})]) == [tokens]
