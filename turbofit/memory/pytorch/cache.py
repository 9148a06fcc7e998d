"""The KV cache of the PyTorch engine: blocks of equal size in one allocation.

In a block, each attention layer's keys and values start at a multiple of 256 bytes. Quantised keys
and values have a 16-bit scale and zero point for every head and token; TurboQuant's values have
only a scale.
Source: lmdeploy cache_engine/schema.py::build_quant_cache_descs #dd1dc9
"""

from __future__ import annotations

from typing import Final, NamedTuple

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.model import Model, TextDims
from turbofit.core.plan import Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.account import CacheShape, VisionLoad
from turbofit.memory.pytorch.weights import PytorchConstants, kv_heads_held

_ALIGN = 256
#: The fewest channels of a wide head; with wide heads a block has at most WIDE_BLOCK tokens.
_WIDE = 512
WIDE_BLOCK = 32
#: The tokens of a block of latents that FlashMLA takes.
LATENT_BLOCK: Final = 64  # lmdeploy executor/base.py `Please set block_size to 64 for flash_mla`

#: The ``quant_policy`` with rotated keys at 4 bits, and rotated values at 2 bits.
TURBO_QUANT: Final = 42

#: Blocks that requests never get: one for padding, and one spare.
RESERVED_BLOCKS = 2


class KvType(NamedTuple):
    """The bits of one key and one value, and the 16-bit scales per head and token."""

    key_bits: int
    value_bits: int
    key_scales: int = 0
    value_scales: int = 0


#: The types by ``quant_policy``; 16 and 17 are the two kinds of fp8.
KV_TYPES: Final = {
    0: KvType(16, 16),
    4: KvType(4, 4, 2, 2),
    8: KvType(8, 8, 2, 2),
    16: KvType(8, 8),
    17: KvType(8, 8),
    TURBO_QUANT: KvType(4, 2, 2, 1),
}


def block_tokens(text: TextDims, settings: Settings) -> int:
    """Return the tokens in one KV block: those of the option, or fewer if the heads are wide.

    With a draft, FlashMLA reads the cache, and takes only `LATENT_BLOCK` tokens a block.
    """
    tokens, drafts = settings.cache_block_seq_len, settings.speculative_algorithm is not UNSET
    return min(tokens, WIDE_BLOCK) if text.head_dim >= _WIDE and not drafts else tokens


def block_bytes(text: TextDims, settings: Settings) -> int:
    """Return the bytes per rank of one KV block, over all layers with attention.

    Latents are cached as keys, whole on every rank; the first channels of a latent are the values.
    """
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    rows = block_tokens(text, settings) * heads
    kind = KV_TYPES[settings.quant_policy]
    bits_held = (kind.key_bits, 0 if text.cached_latent else kind.value_bits)
    sizes = [rows * text.head_dim * bits // 8 for bits in bits_held]
    sizes += [rows * count * HALF for count in (kind.key_scales, kind.value_scales)]
    return sum(round_up(size, _ALIGN) for size in sizes) * text.attention_layers


def cache_shape(text: TextDims, settings: Settings, constants: PytorchConstants) -> CacheShape:
    """Return the layout: one allocation of blocks; the engine keeps two blocks for itself."""
    return CacheShape(
        block_bytes=block_bytes(text, settings),
        block_tokens=block_tokens(text, settings),
        step=constants.page,
        reserved=RESERVED_BLOCKS,
    )


def draft_block(model: Model, settings: Settings) -> int:
    """Return the bytes of a draft's keys and values in one block; 0 without a draft.

    The first rank has the whole of a draft with a checkpoint of its own, other ranks have nothing
    of it. Layers of the model's own checkpoint are divided as the model is.
    """
    if not model.draft:
        return 0
    tp = settings.tp if model.draft.is_own else 1
    return block_bytes(model.draft.text, replace(settings, tp=tp))


def state_slots(settings: Settings) -> int:
    """Return the number of state slots: the batch's, one for the system, one spare, and prefixes'.

    lmdeploy executor/base.py `prefix_cache_state_budget`
    """
    for_prefixes = settings.prefix_cache_state_budget or 0
    return settings.max_batch_size + 2 + for_prefixes


def state_bytes(text: TextDims, settings: Settings, drafted: int = 0) -> int:
    """Return the bytes per rank of the state cache; 0 if every layer has attention.

    A slot has two parts: the convolutions' last inputs of all layers, and the recurrent states of
    all layers. Each part begins at a multiple of 256 bytes. All values have 16 bits, even if
    the config's ``mamba_ssm_dtype`` differs. If ``drafted`` tokens are proposed in a step, a slot
    has the states after each of them, too, since some may be rejected. Source:
    lmdeploy executor/base.py `cache_config.max_batches + 2`
    lmdeploy configurations/qwen3_5.py::Qwen3_5ModelConfigBuilder.build #818bd6
    """
    delta, tp = text.delta, settings.tp
    if delta is None:
        return 0
    window = delta.layers * delta.channels // tp * (delta.kernel + drafted)
    state = delta.layers * delta.value_heads // tp * delta.value_dim * delta.key_dim
    state *= 1 + drafted
    slot = round_up(window * HALF, _ALIGN) + round_up(state * HALF, _ALIGN)
    return state_slots(settings) * slot


def runtime_bytes(text: TextDims, settings: Settings) -> int:
    """Return the bytes for logits that the engine leaves free when it sizes the cache.

    The engine subtracts the bytes from free memory, but never allocates the bytes.
    """
    # lmdeploy executor/base.py `(max_prefill_token_num + max_batches * 2) * vocab_size * 2`
    return (settings.max_prefill_token_num + 2 * settings.max_batch_size) * text.vocab * HALF


class UnitsMet(NamedTuple):
    """Vision units of one forward, and of the next forward; the next pixels are sent early."""

    now: int
    next: int


def engine_bound(rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
    """Return the most vision units in one forward; an upper bound.

    Whole prompts join a prefill up to ``max_prefill_token_num`` tokens. A longer prompt is cut into
    chunks of that size, but never inside an image. An image that is longer than a chunk makes every
    chunk of the prompt as long as the image; smaller images may then share a chunk. Source:
    lmdeploy prefill_scheduler.py::_PrefillScheduler.reserve_long_context_chunk #2b1966
    """
    image_units, tokens = vision_load.units_per_image, settings.max_prefill_token_num
    longest = vision_load.tokens_per_request // max(1, vision_load.images_per_request)
    joined = rule.units_within(tokens, padded=image_units)
    chunk = rule.units_within(max(tokens, longest), padded=image_units)
    alone = max(image_units, min(chunk, vision_load.units_per_request))
    by_batch = settings.max_batch_size * vision_load.units_per_request
    return min(max(alone, joined), by_batch)


def units_met(bound: int, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> UnitsMet:
    """Return the vision units that the peak must allow for in a forward and in the next forward.

    ``bound`` is the most units that can meet in a forward. The result is never too low. The engine
    sends a forward's pixels to the card while the previous forward runs. A gateway may limit the
    units of all clients to less than ``bound``. A single forward can then have all units, and no
    units remain for the next forward. An image longer than ``max_prefill_token_num`` never directly
    follows another request's image: a chunk of text comes between the two images.
    Source: lmdeploy engine_loop.py `self.inputs_maker.prefetch_next_inputs()`
    """
    now = vision_load.budgeted_units(bound)
    if now < bound:
        return UnitsMet(now, 0)
    tokens = settings.max_prefill_token_num
    following = rule.units_within(tokens, padded=vision_load.units_per_image)
    following = min(following, (settings.max_batch_size - 1) * vision_load.units_per_request)
    if vision_load.images_per_request > 1:
        # the next chunk of the same request
        rest = vision_load.units_per_request - vision_load.units_per_image
        following = max(following, min(bound, rest))
    return UnitsMet(now, following)
