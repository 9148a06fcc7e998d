"""Registers stand-ins for classes that a model's repository brings as code.

With the stand-ins a rehearsal runs no code of a model's repository, and downloads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbofit.core.images import NavitRule
from turbofit.model.config import parse_json
from turbofit.model.families import kimi


def plain_gpt_oss_tokenizer() -> None:
    """Make LMDeploy read gpt-oss's tokenizer from the checkpoint's folder, without a download."""
    from lmdeploy import tokenizer

    module: Any = tokenizer
    module.GptOssTokenizer = module.HuggingFaceTokenizer


def plain_gpt_oss_parser() -> None:
    """Make LMDeploy parse gpt-oss's answers with its default parser.

    LMDeploy's parser for gpt-oss downloads a vocabulary.
    """
    from lmdeploy.serve.parsers import ResponseParserManager

    manager: Any = ResponseParserManager
    manager.register_module(name="gpt-oss", module=manager.get("default"), force=True)


def register_intern_s1_pro() -> None:
    """Register Qwen3-VL's config class for Intern-S1-Pro, which has the same keys."""
    from transformers import Qwen3VLMoeConfig

    _register("interns1_pro", Qwen3VLMoeConfig)


def register_for_pytorch() -> None:
    """Register the config classes that the PyTorch engine needs."""
    register_internvl(whole=True)
    register_intern_s1_pro()


def register_internvl(*, whole: bool = False) -> None:
    """Register a config class for InternVL.

    With ``whole`` the language part gets the config class of its model type, so that missing keys
    have the defaults of this class.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    base: Any = PretrainedConfig
    classes: Any = CONFIG_MAPPING

    def inner(**values: Any) -> Any:
        kind = values.get("model_type")
        return (classes[kind] if whole and kind in classes else base)(**values)

    _register("internvl_chat", base, llm_config=inner, vision_config=base)


def infer_channels_of_llava() -> None:
    """Let LLaVA's processor find out which dimension of an image has the channels.

    LMDeploy tells the processor that the last dimension has the channels. Transformers 5.0 to 5.20
    move the channels to the first dimension before they read this argument.
    Source: lmdeploy vl/model/llava_hf.py `input_data_format='channels_last'`
    """
    from lmdeploy.vl.model import llava_hf

    front: Any = llava_hf.LlavaHfVisionModel
    build = front.build_preprocessor

    def built(self: Any, *words: object, **named: object) -> None:
        build(self, *words, **named)
        if type(self) is front:
            self.processor = _Inferring(self.processor)

    front.build_preprocessor = built


class _Inferring:
    """An image processor that ignores the argument ``input_data_format``."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, image: Any, *, input_data_format: object = None, **given: Any) -> Any:
        del input_data_format
        return self._processor(image, **given)


def register_kimi() -> None:
    """Register a config class for Kimi, whose decoder is DeepSeek-V3's."""
    from transformers import DeepseekV3Config, PretrainedConfig

    base: Any = PretrainedConfig
    _register("kimi_k25", base, text_config=DeepseekV3Config, vision_config=base)


def _register(kind: str, base: Any, **parts: Callable[..., Any]) -> None:
    """Register a config class for model type ``kind``; ``parts`` has classes for some fields."""
    from transformers import AutoConfig

    def make(self: Any, **values: Any) -> None:
        for name, part in parts.items():
            setattr(self, name, part(**(values.pop(name, None) or {})))
        packing = getattr(getattr(self, "text_config", None), "quantization_config", None)
        if packing is not None:
            self.quantization_config = packing
        base.__init__(self, **values)

    auto: Any = AutoConfig
    members = {"model_type": kind, "__init__": make}
    auto.register(kind, type(f"Pretend{kind.title()}Config", (base,), members), exist_ok=True)


def stand_in_for_kimi() -> None:
    """Give LMDeploy a config class and a processor for Kimi.

    The processor returns blank images with the grids that turbofit computes.
    """
    from lmdeploy.vl.model import kimi_k25

    register_kimi()
    module: Any = kimi_k25
    module.AutoProcessor = _KimiProcessor


class _KimiProcessor:
    """Takes the places of Kimi's processor and of the ``AutoProcessor`` that loads a processor."""

    def __init__(self, tokenizer: Any, rule: NavitRule) -> None:
        self.tokenizer, self.rule = tokenizer, rule
        self.image_processor = self

    @classmethod
    def from_pretrained(cls, folder: str, **_: object) -> _KimiProcessor:
        from transformers import AutoTokenizer

        auto: Any = AutoTokenizer
        text = Path(folder, "preprocessor_config.json").read_text(encoding="utf-8")
        return cls(auto.from_pretrained(folder), kimi.read_rule(parse_json(text.encode(), folder)))

    def __call__(self, medias: list[dict[str, Any]], text: str, **_: object) -> dict[str, Any]:
        return {**self.tokenizer(text, return_tensors="pt"), **self.preprocess(medias)}

    def preprocess(self, medias: list[dict[str, Any]], **_: object) -> dict[str, Any]:
        import torch

        grids = [[1, *self.rule.patches(*media["image"].size)] for media in medias]
        count, side = sum(rows * columns for _, rows, columns in grids), self.rule.patch_size
        return {
            "pixel_values": torch.zeros(count, 3, side, side),
            "grid_thws": torch.tensor(grids),
        }
