"""The program for llm-compressor: its constants, and runs of it on models of two layers."""

from __future__ import annotations

import ast
import base64
import importlib
import io
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from tests.model.quantize.made import fill_randomly
from tests.support.checkpoints import TEXT, make_internvl_hf, make_qwen2_vl, write, write_files
from turbofit.machine.source import machine_from
from turbofit.model.presets import preset_model
from turbofit.model.quantize.fit import quantizing
from turbofit.model.quantize.program import Request
from turbofit.model.quantize.read import read_result
from turbofit.model.source import resolve_model

EXPERTS = {
    **TEXT, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1,
    "head_dim": 64, "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip
DENSE = {**TEXT, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)


def make_qwen2_5_vl(folder):
    """Qwen2.5-VL, made of Qwen2-VL's checkpoint: its tower has other layers."""
    make_qwen2_vl(folder)
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["processor_class"] = "Qwen2_5_VLProcessor"
    config |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    config["vision_config"] = {
        "depth": 2, "hidden_size": 64, "num_heads": 1, "intermediate_size": 128, "patch_size": 14,
        "out_hidden_size": 128, "in_chans": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 112, "fullatt_block_indexes": [1], "model_type": "qwen2_5_vl",
    }  # fmt: skip
    return write(folder, config, preprocessor_config=processor)


def picture(width):
    from PIL import Image

    data = io.BytesIO()
    Image.effect_noise((width, 96), 80).convert("RGB").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def conversation(number, *, pictured):
    text = f"question {number} of a few words, and of no others"
    parts = [{"type": "text", "text": text}]
    if pictured:
        address = {"url": picture(90 + number)}
        parts.insert(0, {"type": "image_url", "image_url": address})
    said = {"role": "assistant", "content": "an answer " * (number + 2)}
    return {
        "custom_id": str(number),
        "body": {"messages": [{"role": "user", "content": parts}, said]},
    }


def written(model, folder, **options):
    request = Request(name=model, **options)
    known = resolve_model(model) if "/" in model else preset_model(model)
    made = quantizing(known, machine_from("1xrtx3090,ram=64GiB"), request)
    path = folder / "quantize.py"
    path.write_text(made.program)
    return path, made


def test_the_program_is_python_with_the_constants_of_the_request(tmp_path) -> None:
    options = {"data": "my 'own'.jsonl", "samples": 7, "tokens": 512, "revision": "v1"}
    path, made = written("qwen3-30b-a3b", tmp_path, **options)
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id != "DEVICE"
    }
    wanted = {"SAMPLES": "my 'own'.jsonl", "COUNT": 7, "LENGTH": 512, "REVISION": "v1"}
    wanted |= {"MODEL": "qwen3-30b-a3b", "OUT": made.folder, "EXPERTS": True, "GROUP": 128}
    assert wanted.items() <= assigned.items()
    assert assigned["IGNORE"] == list(made.scheme.ignore)
    assert assigned["DTYPE"] == "auto"


def test_a_float32_checkpoint_is_loaded_and_counted_in_16_bits() -> None:
    half = preset_model("llama-3.1-8b")
    full = replace(half, dtype="float32", weight_bytes=2 * half.weight_bytes)
    machine, request = machine_from("1xrtx3090,ram=64GiB"), Request(name="m")
    of_half, of_full = (quantizing(model, machine, request) for model in (half, full))
    assert "DTYPE = 'bfloat16'" in of_full.program
    assert of_full.needs.host == of_half.needs.host
    assert of_full.needs.card == of_half.needs.card
    assert of_full.needs.source == 2 * of_half.needs.source


def functions_of(program, **more):
    """The program's functions, without its imports of llm-compressor and its loss."""
    body = [
        node
        for node in ast.parse(program).body
        if (isinstance(node, ast.FunctionDef) and not node.decorator_list)
        or (isinstance(node, ast.Assign) and node.targets[0].id != "DEVICE")
    ]
    names = {name: importlib.import_module(name) for name in ("inspect", "json", "os", "shutil")}
    names |= {"Path": Path, **more}
    exec(compile(ast.Module(body=body, type_ignores=[]), "quantize.py", "exec"), names)
    return names


def test_the_config_of_what_is_made_of_float32_says_16_bits(tmp_path) -> None:
    half = preset_model("llama-3.1-8b")
    machine, request = machine_from("1xrtx3090,ram=64GiB"), Request(name="m")
    program = quantizing(replace(half, dtype="float32"), machine, request).program
    source, out = tmp_path / "source", tmp_path / "out"
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 8}}
    write_files(source, config=config)
    write_files(out, config={"quantization_config": {"ignore": []}})
    functions_of(program)["copy_the_rest"](source, out)
    made = json.loads((out / "config.json").read_text())
    assert made["torch_dtype"] == made["text_config"]["dtype"] == "bfloat16"


def test_layers_that_propose_tokens_are_copied_bit_by_bit(tmp_path) -> None:
    """Transformers loads none of them, so llm-compressor's result has none."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    source, out = tmp_path / "source", tmp_path / "out"
    write_files(source, config={})
    write_files(out, config={"quantization_config": {"ignore": ["lm_head"]}})
    drafts = {f"mtp.{n}.weight": torch.randn(4, 8).bfloat16() for n in range(3)}
    save_file(
        {"a.weight": torch.zeros(2), "mtp.0.weight": drafts["mtp.0.weight"]},
        source / "1.safetensors",
    )
    save_file({name: drafts[name] for name in list(drafts)[1:]}, source / "2.safetensors")
    save_file({"a.weight_packed": torch.zeros(2)}, out / "model.safetensors")
    program = written("qwen3.5-27b", tmp_path)[0].read_text()
    more = {"safe_open": safe_open, "save_file": save_file}
    functions_of(program, **more)["copy_the_rest"](source, out)
    copied = load_file(out / "model-mtp.safetensors")
    assert copied.keys() == drafts.keys()
    assert all(torch.equal(copied[name], drafts[name]) for name in drafts)
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert files == dict.fromkeys(drafts, "model-mtp.safetensors") | {
        "a.weight_packed": "model.safetensors"
    }
    made = json.loads((out / "config.json").read_text())["quantization_config"]
    assert made["ignore"] == ["lm_head", "re:^mtp[.].*"]


class Ids(list):
    """A text's ids, a row of one batch, as a tensor has them: with a shape, and cut by columns."""

    shape = property(lambda self: (1, len(self)))

    def __getitem__(self, key):
        return Ids(super().__getitem__(key[1])) if isinstance(key, tuple) else self


def read_rows(rows, folder):
    """Return the texts of the samples that the program takes of these lines."""
    samples = folder / "samples.jsonl"
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, _ = written("llama-3.1-8b", folder, data=str(samples), samples=8, tokens=64)
    texts: list[str] = []

    def tokenizer(text, return_tensors):
        texts.append(text[0])
        return {"input_ids": Ids(text[0])}

    model = SimpleNamespace(forward=lambda input_ids: None)
    kept, held = functions_of(path.read_text())["read_samples"](model, tokenizer)
    return texts, len(kept) + len(held)


def test_lines_of_ordinary_logs_are_read_or_left_out(tmp_path, capsys) -> None:
    """They are read after the model was loaded, so a crash there costs minutes."""
    user = {"role": "user", "content": "hi"}
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    rows = [
        {"messages": [user, called]},
        {"messages": [user, {"role": "assistant"}]},
        {"body": {"prompt": "a prompt"}},
        {"messages": [{"role": "user", "content": [video]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"score": 1},
    ]
    texts, count = read_rows(rows, tmp_path)
    assert texts == ["hi\n", "hi\n", "a prompt"]
    assert count == 3
    assert "3 left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "picture_token"),
    [
        (make_qwen2_5_vl, "<|vision_start|><|image_pad|><|vision_end|>"),
        (make_internvl_hf, "<IMG_CONTEXT>"),
        (lambda folder: write(folder, DENSE), ""),
        (lambda folder: write(folder, EXPERTS), ""),
    ],
    ids=["qwen2.5-vl", "internvl-hf", "qwen3", "qwen3-moe"],
)
def test_the_program_makes_what_lmdeploy_reads(
    make, picture_token, tmp_path, monkeypatch, capsys
) -> None:
    """It runs where llm-compressor is installed, on a CPU (PYTHONPATH of a --target folder)."""
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed (0.3 GB)")
    source = make(tmp_path / "model")
    fill_randomly(source / "model.safetensors")
    template = TEMPLATE.replace("PICTURE", picture_token)
    (source / "chat_template.jinja").write_text(template)
    known = resolve_model(str(source))
    lines = [conversation(number, pictured=known.vision is not None) for number in range(6)]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, made = written(str(source), tmp_path, data=str(samples), samples=4, tokens=512)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert "before" in capsys.readouterr().out
    reading = read_result(known, str(tmp_path / made.folder))
    assert reading.problems == ()
    assert reading.engines["turbomind"] == ""
    assert 0 < reading.worst_error < 0.5
    bits = {layer.name: layer.packed for layer in reading.layers}
    assert all(
        packed
        == (
            "layers.N" in name
            and "norm" not in name
            and "vis" not in name
            and "mlp.gate." not in name
        )
        for name, packed in bits.items()
    ), bits
