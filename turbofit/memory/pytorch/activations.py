"""What one forward of the PyTorch engine holds at once, by torch's own allocator.

The engine runs the model's own code eagerly for every prefill, so that what counts is the largest
sum of tensors alive at one moment: in a layer's MLP or its attention, of the decoder or the tower.
Factors are counted in LMDeploy's modelling files and checked on pretend GPUs.
"""

from __future__ import annotations

from turbofit.core.model import Model, PatchRule, TileRule
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.pytorch.constants import PytorchConstants
from turbofit.memory.pytorch.weights import kv_heads_held

__all__ = ["Activations", "Prefill"]

_HALF = 2


class Prefill(Struct):
    """What meets in one prefill: ``tokens``, the whole ``context`` they see, vision ``units``."""

    tokens: int
    context: int
    units: int = 0


class Activations:
    """The stages of one model under one set of settings.

    Args:
        model: the checkpoint.
        settings: the engine's options.
        constants: the generation's figures.
    """

    def __init__(self, model: Model, settings: Settings, constants: PytorchConstants) -> None:
        self.model = model
        self.text = model.text
        self.settings = settings
        self.constants = constants
        self.tp = settings.tp

    def prefill(self, forward: Prefill) -> int:
        """The largest stage of a prefill, in bytes."""
        stages = [self._decoder(forward)]
        if forward.units and self.model.vision is not None:
            stages.append(self._vision(forward))
        return max(stages)

    def sampling(self, rows: int) -> int:
        """Logits of so many rows and what sampling them takes."""
        return rows * self.text.vocab * self.constants.logit + self.constants.sampling_base

    def decode(self, rows: int) -> int:
        """One decoding step of so many rows."""
        return rows * self._mlp_elements() * _HALF

    def _decoder(self, forward: Prefill) -> int:
        held = self._features(forward.units)
        mlp = forward.tokens * self._mlp_elements() * _HALF
        return held + max(mlp, self._attention(forward))

    def _mlp_elements(self) -> int:
        """Elements of a token in a layer's MLP: gate and up, and the hidden states alive."""
        text, constants = self.text, self.constants
        width = 2 * text.intermediate / self.tp
        if text.moe is not None:
            moe = text.moe
            routed = moe.experts_per_token * (2 * moe.intermediate / self.tp + text.hidden)
            width = max(
                width if moe.layers < text.layers else 0.0,
                routed + 2 * moe.shared_intermediate / self.tp,
            )
        return int(width + constants.hidden_copies * text.hidden + constants.token_elements)

    def _attention(self, forward: Prefill) -> int:
        """Projections and output of the tokens, and all keys and values they see, flattened."""
        text, constants = self.text, self.constants
        heads = text.heads * text.head_dim / self.tp
        kv = kv_heads_held(text.kv_heads, self.tp) // self.tp * text.head_dim
        # Hidden states alive as in the MLP, less its own two, and the projections before them.
        alive = (constants.hidden_copies - 1) * text.hidden + constants.token_elements
        # Queries and keys that were normed lie beside those that were not.
        normed = heads + kv if text.qk_norm else 0
        tokens = forward.tokens * int(alive + 2 * heads + 2 * kv + normed)
        return (tokens + 2 * kv * forward.context) * _HALF

    def pixels(self, units: int) -> int:
        """Preprocessed pixels at 16 bits."""
        rule, vision = self.model.image_rule, self.model.vision
        if vision is None:
            return 0
        if isinstance(rule, TileRule):
            return units * vision.channels * rule.tile_size**2 * _HALF
        if isinstance(rule, PatchRule):
            patch = vision.channels * vision.temporal_patch * rule.patch_size**2
            return units * patch * _HALF
        return 0

    def _tower_tokens(self, units: int) -> int:
        """Tokens that the tower itself runs on."""
        rule, vision = self.model.image_rule, self.model.vision
        if vision is None or not isinstance(rule, TileRule):
            return units
        return units * ((rule.tile_size // vision.patch_size) ** 2 + 1)

    def _features(self, units: int) -> int:
        """Pixels and image features, alive until the forward ends."""
        if not units:
            return 0
        embeddings = self._image_tokens(units) * self.text.hidden * _HALF
        return 2 * self.pixels(units) + embeddings + self._deepstack(units)

    def _image_tokens(self, units: int) -> int:
        rule = self.model.image_rule
        if isinstance(rule, TileRule):
            return units * rule.tokens_per_tile
        return units // rule.merge**2 if isinstance(rule, PatchRule) else 0

    def _deepstack(self, units: int) -> int:
        """What the tower's layers give the decoder's first ones, alive from there to the end."""
        each = self.model.vision.deepstack if self.model.vision is not None else 0
        return each * self._image_tokens(units) * self.text.hidden * _HALF

    def _vision(self, forward: Prefill) -> int:
        """All images of the forward in one call of the tower, whatever their number."""
        vision, constants = self.model.vision, self.constants
        assert vision is not None
        copies = constants.vision_copies.get(vision.kind, constants.vision_copies["other"])
        mlp = 2 * vision.intermediate / self.tp
        each = int(copies * vision.hidden + mlp + 2 * vision.head_dim)
        tower = self._tower_tokens(forward.units) * each * _HALF
        embeddings = forward.tokens * self.text.hidden * _HALF
        given = embeddings + 2 * self.pixels(forward.units) + self._deepstack(forward.units)
        return tower + given + constants.vision_base
