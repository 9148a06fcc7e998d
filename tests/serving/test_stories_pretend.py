"""The stories of docs/cases.md on pretend GPUs, until a picture is answered, by small twins."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, ROOT
from tests.support.processes import Child
from tests.support.serving import Served, image, needs, serve_pretend
from turbofit.model.presets import preset_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

pytestmark = [pytest.mark.lmdeploy]
needs("lmdeploy", "fastapi", "torchvision")
with_cuda = pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")


def few_layers(preset: str, folder: Path, layers: int) -> str:
    """A stand-in of so few decoder layers, with the whole tower and its images."""
    model = preset_model(preset)
    cross = tuple(layer for layer in model.text.cross_layers if layer < layers)
    text = replace(model.text, layers=layers, cross_layers=cross)
    return str(write_model(twin_of(replace(model, text=text)), folder / preset))


def answers_a_picture(children: list[Child], state: Path, tokens: int, *words: str) -> Served:
    """Serve until a picture of so many tokens at least is answered."""
    path = {} if "internvl2-2b" in words else {"PYTHONPATH": f"{CUDA_PATH}:{ROOT}"}
    served = serve_pretend(children, state, *words, **path)
    served.wait()
    status, headers, answer = served.chat(image(640, 480))
    assert (status, headers["x-turbofit-pretend"]) == (200, "1")
    assert answer["usage"]["prompt_tokens"] >= tokens
    assert answer["usage"]["completion_tokens"] >= 1
    served.child.process.terminate()
    assert served.child.finish() == 0
    return served


@pytest.mark.exhaustive  # the engine itself: `test_pretend_pipeline`
def test_1_internvl2_over_four_cards_without_peer_access(children, tmp_path) -> None:
    words = ("internvl2-2b", "--on", "4xrtx3090", "--tp", "4")
    answers_a_picture(children, tmp_path, 256, *words)


@with_cuda
@pytest.mark.exhaustive  # 40 s of a processor: LMDeploy's server and its PyTorch engine
def test_2_and_3_llava_whose_images_transformers_5_breaks(children, tmp_path) -> None:
    """A merged LoRA has these tensors; of the L4 others hold 3 GiB."""
    folder = few_layers("llava-1.5-7b", tmp_path, 2)
    words = (folder, "--on", "1xl4:free=19GiB", "--max-batch-size", "1")
    served = answers_a_picture(children, tmp_path, 576, *words)
    assert any(
        "pretend GPUs read its images as Transformers 5.21 does" in line
        for line in served.child.lines
    )


@with_cuda
@pytest.mark.exhaustive  # its memory: `memory/transformers/test_account`; its server: `fallback`
def test_4_llava_onevision_on_transformers(children, tmp_path) -> None:
    words = ("llava-onevision-0.5b", "--on", "2xrtx4090")
    answers_a_picture(children, tmp_path, 2 * 729, *words)


@with_cuda
@pytest.mark.exhaustive  # its server: `fallback/test_supervised_server`
def test_4_llama_3_2_vision_on_transformers(children, tmp_path) -> None:
    folder = few_layers("llama-3.2-11b-vision", tmp_path, 4)
    # Its images are read by cross-attention, and fill no place of the prompt.
    served = answers_a_picture(
        children, tmp_path, 1, folder, "--on", "1xrtx4090", "--engine", "transformers"
    )
    (engine,) = served.record["attempts"][0]["engines"]
    (peak,) = [row for row in engine["beside"] if row["what"] == "in use at most"]
    assert 0.8 <= peak["actual"] / peak["forecast"] <= 1.0


@with_cuda
@pytest.mark.exhaustive
def test_5_cogvlm_over_two_cards(children, tmp_path) -> None:
    folder = few_layers("cogvlm-17b", tmp_path, 2)
    words = (folder, "--on", "2xrtx3090", "--replicas", "1", "--engine", "pytorch")
    answers_a_picture(children, tmp_path, 1227, *words, "--tp", "2")
