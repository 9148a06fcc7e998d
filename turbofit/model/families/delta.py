"""Hybrid language models: which layers have a gated delta net in place of attention."""

from __future__ import annotations

from typing import Final

from turbofit.core.model import DeltaDims
from turbofit.model.config import Section

__all__ = ["read_delta"]

_LINEAR: Final = "linear_attention"
_FULL: Final = "full_attention"
#: Every so manyth layer has attention where ``layer_types`` does not say. Source: Transformers.
_INTERVAL: Final = 4


def read_delta(config: Section, layers: int) -> DeltaDims | None:
    """The delta nets of a Qwen3.5, None where every layer has attention.

    Args:
        config: the part of config.json that describes the language model.
        layers: of the language model.

    Raises:
        UsageError: kinds of layers that are unknown or of another number, or heads that do not
            divide.
    """
    keys = config.integer("linear_num_key_heads", 16, high=1 << 12)
    values = config.integer("linear_num_value_heads", 32, high=1 << 12)
    if values % keys:
        raise config.error("linear_num_key_heads", f"{keys} does not divide {values} value heads")
    linear = _linear_layers(config, layers)
    if not linear:
        return None
    return DeltaDims(
        layers=linear,
        key_heads=keys,
        value_heads=values,
        key_dim=config.integer("linear_key_head_dim", 128, high=1 << 10),
        value_dim=config.integer("linear_value_head_dim", 128, high=1 << 10),
        kernel=config.integer("linear_conv_kernel_dim", 4, high=64),
    )


def _linear_layers(config: Section, layers: int) -> int:
    if "layer_types" not in config:
        interval = config.integer("full_attention_interval", _INTERVAL, high=1 << 10)
        return layers - layers // interval
    kinds = config.strings("layer_types")
    if len(kinds) != layers:
        raise config.error("layer_types", f"names {len(kinds)} layers of {layers}")
    if other := set(kinds) - {_LINEAR, _FULL}:
        raise config.error("layer_types", f"has an unknown kind: {min(other)[:40]!r}")
    linear = kinds.count(_LINEAR)
    if linear == layers:
        raise config.error("layer_types", "leaves no layer with attention")
    return linear
