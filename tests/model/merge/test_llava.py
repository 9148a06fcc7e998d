"""LLaVA's original format, converted: the same numbers, and files that every reader takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.model.merge.cases import (
    LLAVA,
    load,
    make_adapter,
    make_base,
    make_clip,
    make_llava_lora,
    make_original,
    make_vicuna,
    projector,
)
from turbofit.core.errors import UsageError
from turbofit.model.merge.llava import hf_name, template_warnings
from turbofit.model.merge.merge import merge

pytestmark = pytest.mark.slow

torch: Any = None  # by `conftest`


@pytest.fixture(scope="module")
def clip(transformers, tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("tower") / "clip", transformers)


@pytest.fixture(scope="module")
def converted(clip, tmp_path_factory):
    """An original LLaVA, and what it became."""
    folder = tmp_path_factory.mktemp("llava")
    base = make_original(folder / "llava-v1.5-tiny")
    out = folder / "llava-v1.5-tiny-hf"
    return base, out, merge(str(base), None, str(out), vision_tower=str(clip))


def original_logits(transformers, state, clip, pixels, before, after):
    """The original's way: text embedded in two parts, the picture's features between them."""
    text = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LLAVA, "model_type": "llama"})
    )
    text.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    vision = transformers.CLIPModel.from_pretrained(clip).vision_model
    vision = vision.half().float()  # LLaVA runs it at the language model's precision
    parts = {key: value.float() for key, value in projector().items()}
    with torch.no_grad():
        seen = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        first, second = (
            (parts[f"model.mm_projector.{i}.weight"], parts[f"model.mm_projector.{i}.bias"])
            for i in (0, 2)
        )
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(seen, *first))
        hidden = torch.nn.functional.linear(hidden, *second)
        embed = text.get_input_embeddings()
        row = torch.cat([embed(torch.tensor([before])), hidden, embed(torch.tensor([after]))], 1)
        return text(inputs_embeds=row).logits


def hf_logits(transformers, out, pixels, before, after):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([[*before, *[96] * 4, *after]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def language_model(base):
    state = {}
    for path in base.glob("pytorch_model*.bin"):
        state |= torch.load(path)
    return {key: state[key] for key in state if "mm_projector" not in key and "inv_freq" not in key}


def test_the_conversion_gives_the_logits_of_the_original(transformers, clip, converted, tmp_path):
    base, out, _ = converted
    torch.manual_seed(1)
    pixels, before, after = torch.randn(1, 3, 28, 28), [1, 5, 9], [7, 20, 3]
    expected = original_logits(transformers, language_model(base), clip, pixels, before, after)
    found = hf_logits(transformers, out, pixels, before, after)
    assert found.shape == (1, 10, 128)
    torch.testing.assert_close(found[..., :96], expected, rtol=1e-5, atol=1e-5)
    assert (found[..., 96:] <= found[..., :96].max(-1, keepdim=True).values).all()
    # Names and shapes are those that Transformers saves.
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    saved, tensors = load(tmp_path / "saved"), load(out)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[key], saved[key]) for key in saved)


def test_its_layout_is_that_of_llava_hf(clip, converted, tmp_path):
    base, out, said = converted
    tensors = load(out)
    assert said.converted
    assert said.warnings == ()
    assert (said.architecture, said.dtype) == ("LlavaForConditionalGeneration", "float16")
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    rows = tensors["language_model.model.embed_tokens.weight"]
    was = language_model(base)["model.embed_tokens.weight"]
    assert torch.equal(rows[:96], was)
    assert torch.equal(rows[96:], was.double().mean(0).half().expand(32, -1))
    assert tensors["language_model.lm_head.weight"].shape == (128, 32)
    assert not [name for name in tensors if "text_model" in name or "inv_freq" in name]
    config = json.loads((out / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (96, 97)
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (4, -2)
    assert json.loads((out / "generation_config.json").read_text()) == {"pad_token_id": 97}
    assert (out / "LICENSE.txt").exists()
    # The same input gives the same output.
    again = tmp_path / "llava-v1.5-again"
    merge(str(base), None, str(again), vision_tower=str(clip))
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_transformers_reads_tokenizer_and_processor(transformers, converted):
    _, out, _ = converted
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(out)
    assert type(processor).__name__ == "LlavaProcessor"
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "w9", "</s>"])
    assert (ids, len(processor.tokenizer)) == ([96, 97, 9, 2], 98)
    assert processor.tokenizer.pad_token_id == 97
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5 w6"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "USER: <image>\nw5 w6 ASSISTANT:"
    made = processor(images=Image.new("RGB", (50, 20)), text=prompt, return_tensors="pt")
    assert (made["input_ids"] == 96).sum() == 4
    assert made["pixel_values"].shape == (1, 3, 28, 28)
    plain = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    text = processor.tokenizer.apply_chat_template(plain, tokenize=False)
    assert text == "USER: w5 ASSISTANT: w6</s>"


@pytest.mark.parametrize("aspect", ["pad", ""])
def test_a_wide_picture_is_padded_where_the_original_pads(transformers, clip, tmp_path, aspect):
    from PIL import Image

    base = make_original(tmp_path / "base", config={"image_aspect_ratio": aspect})
    (warning,) = merge(str(base), None, str(tmp_path / "x"), vision_tower=str(clip)).warnings
    assert "--chat-template llava-v1" in warning  # a folder whose name gets another template
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")
    picture = Image.new("RGB", (56, 28), (255, 255, 255))
    corner = processor(picture, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    white = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    assert torch.allclose(corner, white, atol=0.02) == (aspect == "")
    if aspect == "pad":
        assert corner.abs().max() < 0.02


def test_lora_over_vicuna(transformers, clip, tmp_path):
    base = make_vicuna(tmp_path / "vicuna-7b-v1.5")
    config = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    adapter = make_llava_lora(tmp_path / "lora", config=config)
    out = tmp_path / "llava-v1.5-7b-merged"
    said = merge(str(base), str(adapter), str(out), vision_tower=str(clip))
    assert (said.loras, said.replaced, said.converted, said.warnings) == (4, 0, True, ())
    text = tmp_path / "text"
    merge(str(base), str(make_adapter(tmp_path / "plain")), str(text))
    pixels = torch.ones(1, 3, 28, 28)
    expected = original_logits(transformers, load(text), clip, pixels, [1, 2], [30])
    found = hf_logits(transformers, out, pixels, [1, 2], [30])
    torch.testing.assert_close(found[..., :96], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mm_projector_type": "linear"}, "'linear' has no place"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ({"mm_use_im_start_end": True}, "tokens around each picture"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
        ({"mm_vision_tower": "google/siglip-so400m"}, "SigLIP"),
        ({"num_hidden_layers": 5}, "would lack language_model.model.layers.2"),
    ],
)
def test_what_the_hf_format_cannot_say(clip, tmp_path, config, words):
    base = make_original(tmp_path / "base", config=config)
    with pytest.raises(UsageError) as caught:
        merge(str(base), None, str(tmp_path / "out"), vision_tower=str(clip))
    assert words in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_has_no_place_is_refused_and_not_dropped():
    assert hf_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    with pytest.raises(UsageError, match=r"model\.vision_resampler"):
        hf_name("model.vision_resampler.query")


def test_towers_that_are_none(clip, tmp_path):
    base = make_original(tmp_path / "base")
    other = make_base(tmp_path / "other")
    for tower, words in (
        (tmp_path / "nowhere", "neither a folder"),
        (other, "no vision_model"),
    ):
        with pytest.raises(UsageError, match=words):
            merge(str(base), None, str(tmp_path / "out"), vision_tower=str(tower))
    adapter = make_adapter(tmp_path / "lora")
    with pytest.raises(UsageError, match="only for an original LLaVA"):
        merge(str(other), str(adapter), str(tmp_path / "out"), vision_tower=str(clip))


@pytest.mark.parametrize(
    "path",
    ["/m/llava-v1.5-7b-merged", "/m/LLaVA-1.5-7b-hf", "/m/vicuna-out", "/v1/llava", "/m/llava-7b"],
)
@pytest.mark.lmdeploy
def test_the_warning_is_what_lmdeploy_does(transformers, path):
    from lmdeploy.model import Llavav1

    assert (not template_warnings(path)) == (Llavav1.match(path) == "llava-v1")


@pytest.mark.lmdeploy
def test_lmdeploys_front_end_reads_it(transformers, converted):
    """Its image token is ours, and a picture takes as many as the config says.

    The processor is Transformers' PIL one: LMDeploy 0.18 tells it that pictures come channels
    last, which the torchvision one of Transformers 5 takes for pictures that it has turned already.
    """
    from lmdeploy.vl.model.builder import load_vl_model
    from PIL import Image

    _, out, _ = converted
    model = load_vl_model(str(out), "pytorch")
    assert model.hf_config.image_token_index == 96
    model.processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    content = [{"type": "image", "data": Image.new("RGB", (50, 20))}]
    answer = model.preprocess([{"role": "user", "content": content}])[-1]["content"][0]
    assert (answer["image_tokens"], answer["pixel_values"].shape) == (4, (1, 3, 28, 28))
