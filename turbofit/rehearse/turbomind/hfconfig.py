"""Stand-ins for what families bring of their own: config classes, gpt-oss's tokenizer.

InternVL's chat models and Intern-S1-Pro bring Python files for them; a rehearsal executes none.
"""

from __future__ import annotations

from typing import Any


def plain_gpt_oss_tokenizer() -> None:
    """Gives gpt-oss the tokenizer of its folder, in a rehearsal's child only.

    LMDeploy's own asks openai_harmony for one, which fetches its vocabulary from the network.
    """
    from lmdeploy import tokenizer

    module: Any = tokenizer
    module.GptOssTokenizer = module.HuggingFaceTokenizer


def plain_gpt_oss_parser() -> None:
    """Lets a server read gpt-oss's answers as other models', on pretend GPUs only.

    LMDeploy's own parser asks openai_harmony for the same vocabulary.
    """
    from lmdeploy.serve.parsers import ResponseParserManager

    manager: Any = ResponseParserManager
    manager.register_module(name="gpt-oss", module=manager.get("default"), force=True)


def register_intern_s1_pro() -> None:
    """Registers a class with the keys of Intern-S1-Pro's own, in a rehearsal's child only."""
    from transformers import AutoConfig, Qwen3VLMoeConfig

    kind = "interns1_pro"
    base: Any = Qwen3VLMoeConfig
    auto: Any = AutoConfig
    made = type("PretendInternS1ProConfig", (base,), {"model_type": kind})
    auto.register(kind, made, exist_ok=True)


def register_internvl(*, whole: bool = False) -> None:
    """Registers the class with Transformers, in a rehearsal's child only.

    Args:
        whole: give the language model's part the class of its type, with all its defaults, which
            LMDeploy's PyTorch engine reads.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    base: Any = PretrainedConfig
    classes: Any = CONFIG_MAPPING

    def inner(values: dict[str, Any]) -> Any:
        kind = values.get("model_type")
        return (classes[kind] if whole and kind in classes else base)(**values)

    def make(self: Any, llm_config: Any = None, vision_config: Any = None, **rest: Any) -> None:
        base.__init__(self, **rest)
        self.llm_config = inner(llm_config or {})
        self.vision_config = base(**(vision_config or {}))

    def to_dict(self: Any) -> dict[str, Any]:
        out = dict(base.to_dict(self))
        out["llm_config"] = self.llm_config.to_dict()
        out["vision_config"] = self.vision_config.to_dict()
        return out

    members = {"model_type": "internvl_chat", "__init__": make, "to_dict": to_dict}
    auto: Any = AutoConfig
    auto.register(
        "internvl_chat", type("PretendInternVLChatConfig", (base,), members), exist_ok=True
    )
