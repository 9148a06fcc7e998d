"""What requests ask of one rank: bytes to read, products to compute, hidden states to reduce."""

from __future__ import annotations

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad

__all__ = ["StepWork", "vision_seconds", "work_of"]


class StepWork(Struct):
    """One model in one shape; all of one rank unless the name says otherwise.

    ``weights`` are bytes that a decode step reads whatever its batch, ``experts`` those of routed
    experts, of which a token takes the share ``routed``. ``token_flops`` and ``pair_flops`` are of
    one token through the layers, and of one token's attention to one other. ``vision_flops`` are of
    one unit. ``hidden_bytes`` is one token's hidden state.
    """

    layers: int
    hidden_bytes: int
    weights: float
    experts: float
    routed: float
    token_flops: float
    pair_flops: float
    kv_bytes: float
    vision_flops: float = 0.0
    encodes_again: bool = False

    def read_bytes(self, batch: float) -> float:
        """Bytes of weights that one step reads: more experts are met, the more tokens there are."""
        return self.weights + self.experts * float(1 - (1 - self.routed) ** batch)


def work_of(model: Model, settings: Settings, engine: Engine) -> StepWork:
    """The work of a model under settings.

    Args:
        model: the checkpoint.
        settings: ``tp``, and what decides the size of a cached token.
        engine: whose sharding counts.
    """
    text, tp = model.text, settings.tp
    traffic = engine.traffic(model, tp)
    routed = share = 0.0
    if text.moe is not None:
        moe = text.moe
        routed = moe.experts_per_token / moe.experts
        of_experts = 3.0 * text.hidden * moe.intermediate * moe.experts * moe.layers
        share = of_experts / (of_experts + _dense_parameters(model, with_experts=False))
    vision = traffic.vision / 2 * 2 * model.unit_tower_tokens
    return StepWork(
        layers=text.layers,
        hidden_bytes=text.hidden * 2,
        weights=traffic.decode * (1 - share),
        experts=traffic.decode * share,
        routed=routed,
        token_flops=2 * _dense_parameters(model) / tp,
        pair_flops=4.0 * text.heads * text.head_dim * text.attention_layers / tp,
        kv_bytes=engine.block_bytes(model, settings) / settings.cache_block_seq_len,
        vision_flops=vision,
        encodes_again=engine.encodes_again,
    )


def vision_seconds(work: StepWork, requested_load: VisionLoad, passes: int, flops: float) -> float:
    """Seconds of a request's images; those that chunked prefill cuts may be encoded again."""
    if not requested_load.units_per_image:
        return 0.0
    encodes = requested_load.images_per_request + (passes - 1 if work.encodes_again else 0)
    return work.vision_flops * requested_load.units_per_image * encodes / flops


def _dense_parameters(model: Model, *, with_experts: bool = True) -> float:
    """Parameters that one token passes through, without the embedding."""
    text = model.text
    gate = text.heads if text.output_gate else 0
    attention = text.hidden * text.head_dim * (2 * text.heads + gate + 2 * text.kv_heads)
    attention *= text.attention_layers
    if text.delta is not None:
        delta = text.delta
        attention += delta.layers * text.hidden * (delta.channels + 2 * delta.values)
    mlp = 3.0 * text.hidden * text.intermediate * text.layers
    if text.moe is not None:
        moe = text.moe
        routed = moe.experts_per_token * moe.intermediate if with_experts else 0
        mlp *= 1 - moe.layers / text.layers
        mlp += 3.0 * text.hidden * (routed + moe.shared_intermediate) * moe.layers
    return float(attention + mlp + text.vocab * text.hidden)
