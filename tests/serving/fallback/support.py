"""A tiny Qwen2-VL with random weights, and the fallback's server around it in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from tests.support.checkpoints import make_qwen2_vl
from tests.support.processes import free_port
from tests.support.waiting import HANG, until
from turbofit.core.model import AudioDims
from turbofit.model.presets import preset_model
from turbofit.rehearsal.checkpoint.twin import twin_of, write_model

NAME = "tiny/Qwen2-VL"
KEY = "a-key"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen2_vl(folder: Path, *, layers: int = 4) -> Path:
    """A checkpoint that Transformers itself made, with a chat template that takes images."""
    import torch
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    make_qwen2_vl(folder, max_pixels=200704)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": _TEMPLATE}))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))
    config = AutoConfig.from_pretrained(str(folder))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = 258
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder))
    return folder


#: The thinker's modules, as a plan's device map names them.
OMNI_MAP = dict.fromkeys(
    ("audio_tower", "visual", "model.embed_tokens", "model.rotary_emb", "model.layers.0",
     "model.layers.1", "model.norm", "lm_head"),
    "cpu",
)  # fmt: skip


def tiny_omni(folder: Path) -> Path:
    """A Qwen2.5-Omni with random weights and a talker's, whose files name no end of an answer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

    audio = AudioDims(layers=1, hidden=32, heads=2, intermediate=64, mel_bins=16, positions=40)
    model = preset_model("qwen2.5-omni-3b")
    assert model.vision is not None
    vision = replace(model.vision, hidden=32, layers=2, heads=2, intermediate=64, audio=audio)
    text = replace(
        model.text, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        vocab=512, tie_word_embeddings=False,
    )  # fmt: skip
    write_model(twin_of(replace(model, text=text, vision=vision)), folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(str(folder)).thinker_config
    weights = Qwen2_5OmniThinkerForConditionalGeneration(config).state_dict()
    stored = {f"thinker.{name}": one for name, one in weights.items()}
    stored["talker.model.norm.weight"] = torch.ones(64)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "generation_config.json"
    path.write_text('{"_from_model_config": true, "transformers_version": "4.50.0.dev0"}')
    return folder


def tiny_map(layers: list[int | str]) -> dict[str, int | str]:
    """A map of that model: everything on the CPU but for its layers."""
    made: dict[str, int | str] = {
        "model.visual": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.rotary_emb": "cpu",
    }
    made |= {f"model.language_model.layers.{n}": where for n, where in enumerate(layers)}
    return {**made, "model.language_model.norm": "cpu", "lm_head": "cpu"}


class Served:
    """The server on a port of its own, around its ``model``."""

    def __init__(self, folder: Path, placed: Mapping[str, int | str] | None = None) -> None:
        import uvicorn

        from turbofit.gateway.config import GatewayConfig
        from turbofit.serving.fallback_server import FallbackApp, load

        self.ended: list[str] = []
        placed = placed or tiny_map(["cpu"] * 4)
        self.model = load(str(folder), placed, "float32", 512, str(folder))
        app = FallbackApp(self.model, NAME, GatewayConfig(api_key=(KEY,)), self.ended.append)
        self.port = free_port()
        served = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error")
        self._server = uvicorn.Server(served)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started, "the server to listen")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(HANG)
