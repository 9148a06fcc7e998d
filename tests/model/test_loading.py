"""The model that the fallback's server and its rehearsal load, against Transformers' own."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from tests.serving.fallback.support import OMNI_MAP, tiny_omni, tiny_qwen2_vl
from turbofit.model import loading
from turbofit.model.loading import installed_names, load_model, load_processor

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(find_spec("accelerate") is None, reason="needs Transformers and accelerate"),
]
WORDS = [[5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    return tiny_omni(tmp_path_factory.mktemp("omni"))


def test_of_a_model_that_speaks_the_thinker_alone_is_loaded(omni):
    import torch
    from safetensors.torch import load_file

    model, processor = load_model(str(omni), dtype="float32"), load_processor(str(omni))
    assert type(model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5OmniProcessor"
    files = load_file(omni / "model.safetensors")
    assert "talker.model.norm.weight" in files
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, files[f"thinker.{name}"]), name
    # An answer ends at the tokenizer's end where no file names one: Transformers leaves it open,
    # and would write until the context is full.
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id is not None
    # Only the last logits are made.
    with torch.no_grad():
        ids = torch.tensor(WORDS)
        made = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        whole = model.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        last = torch.nn.functional.linear(whole[:, -1:], model.lm_head.weight)
    assert made.shape == (1, 1, model.config.text_config.vocab_size)
    assert torch.equal(made, last)


def test_the_map_of_the_thinker_names_the_modules_of_this_transformers(omni, monkeypatch):
    """5.21 moved them; names that are not there are no error, and all would be on the CPU."""
    import transformers

    given, usual = {}, transformers.AutoModelForImageTextToText.from_pretrained

    def spied(*words, **settings):
        given.update(settings)
        return usual(*words, **settings)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", spied)
    model = load_model(str(omni), device_map=OMNI_MAP, dtype="float32")
    assert given["device_map"].keys() <= dict(model.named_modules()).keys()
    newer = SimpleNamespace(Qwen2_5OmniThinkerModel=None)
    for library, text, vision in (
        (newer, "model.language_model", "model.visual"), (SimpleNamespace(), "model", "visual"),
    ):  # fmt: skip
        monkeypatch.setattr(loading, "_transformers", lambda library=library: library)
        named = installed_names({"model.layers.1": 0, "visual": 1, "lm_head": 2})
        assert named == {f"{text}.layers.1": 0, vision: 1, "lm_head": 2}


def test_other_models_are_as_transformers_loads_them(tmp_path):
    import torch

    folder = tiny_qwen2_vl(tmp_path / "m")
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    model = load_model(str(folder), dtype="float32")
    assert model.generation_config.eos_token_id == end
    with torch.no_grad():
        assert model(input_ids=torch.tensor(WORDS)).logits.shape[1] == len(WORDS[0])
