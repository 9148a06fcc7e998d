"""A config class for InternVL's chat models, so that none of their own code is run.

Their checkpoints bring a Python file for this; a rehearsal does not execute it.
"""

from __future__ import annotations

from typing import Any


def register_internvl() -> None:
    """Registers the class with Transformers, in a rehearsal's child only."""
    from transformers import AutoConfig, PretrainedConfig

    base: Any = PretrainedConfig

    def make(self: Any, llm_config: Any = None, vision_config: Any = None, **rest: Any) -> None:
        base.__init__(self, **rest)
        self.llm_config = base(**(llm_config or {}))
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
