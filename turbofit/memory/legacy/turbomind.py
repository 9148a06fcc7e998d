"""TurboMind before 0.18: the ledger has the terms of 0.18, by the rules of a generation.

The order of a ledger is: other processes' ``used`` bytes; the context, the communicator and the
GEMM workspace; the torch tower, if it is loaded before the cache; the weights; the cache; the
buffers. Most versions before 0.18 have no warm-up. Their ``steady`` bytes are those of a server
that has answered one image at the image's default limit, and ``pool_warmup`` is the memory that the
pools keep of that image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final

from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.messages import counted
from turbofit.core.model import Model, TextDims
from turbofit.core.plan import HostMemory, Settings, Term
from turbofit.core.units import FLOAT, HALF, INT, round_up
from turbofit.memory.account import (
    PAGE,
    POOL_WARMUP,
    Account,
    CacheShape,
    EngineLaunch,
    LateMemory,
    RankWeights,
    StaticMemory,
    VisionLoad,
    batch_size,
    term,
    total_bytes,
    transients,
)  # fmt: skip
from turbofit.memory.legacy.generations import (
    Generation,
    generation_of,
    legacy_constants,
    legacy_weight_classes,
    older_layouts,
    tower_activations,
    tower_bytes,
)
from turbofit.memory.turbomind.account import (
    Turbomind,
    TurbomindAccount,
    before_terms,
    cache_terms,
    rank_weights,
)
from turbofit.memory.turbomind.cache import cache_shape
from turbofit.memory.turbomind.pool import CURAND_STATE, POINTER
from turbofit.memory.turbomind.weights import EngineConstants, kv_heads_held, lm_head_rows
from turbofit.memory.versions import FIRST_CURRENT

#: Bytes for each vocabulary entry and row sampled with top_k=0: logits, ids, sorting. Upper end.
_SAMPLING: Final = 20
_WORDS = 4 * 32 * INT  # bytes of stop and bad words, with offsets
#: The term for memory that torch keeps after loading.
_KEPT = "torch_cache"
_FOUR_BIT = frozenset({"awq", "gptq"})
#: Text tokens of a request in addition to its images.
PROMPT: Final = 64
_INT8 = 8


class GroupAccount(Account):
    """The common base of the accounts of all old engines.

    ``pool_warmup`` has the memory that allocators keep of the first image, since most old engines
    have no warm-up. Terms after the cache can depend on the cache's size.
    """

    dies: ClassVar[str] = "aborts"
    cache_shortfall: str = "that it needs at least ({more} more), and LMDeploy stops"
    allocator: ClassVar[str] = "the pools of TurboMind and torch"
    warmup_words: ClassVar[str] = "in LMDeploy's own warm-up or with its first image"
    admits_prompts: ClassVar[bool] = False  # the tower is Python code before the engine
    #: Bytes of ``pool`` that the engine takes before any request.
    engine_warmup = 0
    least_blocks = 1

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002 - alike on all GPUs
        return cache_terms(round_up(self.region_at(ratio), PAGE), ratio, 0)

    def missing_at(self, ratio: float) -> int:
        """Return the bytes that the tightest GPU lacks for its margin with this ratio, or 0."""
        return max(0, *(ledger.margin - ledger.headroom for ledger in self.ledgers_at(ratio)))


class _Forward:
    """Sizes of forwards, for an account whose cache holds ``cached`` tokens.

    Methods return bytes per rank, or elements of a token.

    Attributes:
        session_len: tokens of the longest sequence; some engines limit them to the cache.
        buffer_session: tokens of the longest sequence in the buffers. The cache does not limit
          buffers that are allocated before the cache.
        buffer_tokens: tokens for which the persistent buffers of a forward are made.
        tokens: the most tokens of one forward that fit into the cache.
        context: the most tokens of all sequences in one forward. A shared prefix counts for each
          sequence, up to a session (``max_context_token_num``).
        warmup_tokens: tokens of the longest forward in the engine's warm-up, 0 without a warm-up.
    """

    def __init__(self, account: LegacyAccount, cached: int) -> None:
        self._account, settings, rules = account, account.settings, account.generation
        self._text, self._tp = account.model.text, settings.tp
        cached, session = max(1, cached), settings.session_len
        self.session_len = min(session, cached) if rules.cache.truncates_session else session
        self.buffer_session = session if rules.cache.after_buffers else self.session_len
        prefill = settings.max_prefill_token_num
        if rules.forward != "session":
            self.buffer_tokens = prefill + settings.max_batch_size
        elif rules.iteration == "session":
            # LMDeploy before 0.3 has no max_prefill_token_num. A given value is that version's
            # max_context_token_num.
            self.buffer_tokens = prefill or rules.context_sessions * session
        else:
            self.buffer_tokens = session
        self.tokens = min(self.buffer_tokens, cached)
        if rules.iteration != "session":
            self.tokens = min(self.tokens, prefill)
        longest = session if settings.enable_prefix_caching else self.session_len
        self.context = max(self.tokens, longest)
        most = self.buffer_tokens
        lengths = () if rules.warmup == "none" else legacy_constants().tuning_tokens
        if rules.warmup in ("forward", "requests"):
            lengths = (*lengths, most)
        if rules.warmup == "requests":
            most = min(most, self.session_len)
        self.warmup_tokens = max((n for n in lengths if n <= most), default=0)

    def pool(self, tokens: int, context: int) -> int:
        """Return the pool's bytes after a forward of ``tokens`` that samples one row."""
        if tokens == 0:
            return 0
        text, tp, account = self._text, self._tp, self._account
        heads = text.heads // tp
        kv = kv_heads_held(text.kv_heads, tp) // tp
        flat = 2 * kv * (context + account.constants.kv_flatten_pad_tokens)
        attention = (tokens * (2 * heads + 2 * kv) + flat) * text.head_dim * HALF
        ffn = tokens * self._feed_forward() * HALF
        size = attention + ffn
        if account.generation.aliased:
            size = max(attention, ffn) + tokens * text.hidden * HALF
        return round_up(size + _SAMPLING * lm_head_rows(text, tp), PAGE)

    def batch(self, rows: int) -> int:
        """Return the bytes for sampling and decoding ``rows`` rows that `pool` does not count.

        `pool` already counts the sampling of one row. The number is an upper bound. In some
        versions, the workspace for split decoding grows with the batch.
        """
        text, tp = self._text, self._tp
        sampling = _SAMPLING * (rows - 1) * lm_head_rows(text, tp)
        splits = self._account.generation.buffers.split_rows
        return sampling + rows * splits * (text.heads // tp) * (text.head_dim + 2) * FLOAT

    def _feed_forward(self) -> int:
        """Return the elements of a token in gate and up together, or in all chosen experts."""
        text, tp = self._text, self._tp
        dense, moe = 2 * text.intermediate // tp, text.moe
        if moe is None:
            return dense
        routed = moe.experts_per_token * (2 * moe.intermediate // tp + text.hidden)
        return max(dense, routed + 2 * moe.shared_intermediate // tp)


def _buffers(account: LegacyAccount, forward: _Forward) -> Iterator[tuple[str, int, str]]:
    """Yield the persistent device buffers of one rank: (term, bytes, note)."""
    model, settings, rule = account.model, account.settings, account.generation.buffers
    text, batch = model.text, settings.max_batch_size
    tokens, session_len = forward.buffer_tokens, forward.buffer_session
    vocab = round_up(text.vocab, settings.tp)
    heads = text.heads // settings.tp
    hidden = rule.hidden * tokens * text.hidden * HALF
    yield "hidden_states", hidden, f"{tokens} tokens"
    if rule.kv_copies:
        kv = max(1, text.kv_heads // settings.tp) * text.head_dim
        yield "kv_copies", rule.kv_copies * tokens * kv * HALF, "linear keys and values"
    note = f"{rule.token_ids} of max_batch_size × session_len"
    yield "token_ids", rule.token_ids * batch * session_len * INT, note
    if rule.logits:
        yield "logits", rule.logits * batch * vocab, "max_batch_size × vocabulary"
    elif settings.tp > 1:  # one buffer contains hidden states and logits
        larger = max(0, batch * lm_head_rows(text, settings.tp) * HALF - hidden)
        yield "logits", larger, "logits beyond the hidden states of the shared buffer"
    if rule.log_probs:
        yield "log_probs", 2 * batch * rule.log_probs * INT, "and their indices"
    if rule.attention_tokens:
        floats = heads * (text.head_dim + rule.attention_extra) + 1
        yield "attention_workspace", rule.attention_tokens * floats * FLOAT, "split-k outputs"
    pointers = batch * -(-session_len // settings.cache_block_seq_len) * POINTER
    small = pointers + batch * (_WORDS + 4 * CURAND_STATE + 2 * text.hidden * HALF)
    small += tokens * INT
    if model.mrope:
        # M-RoPE has 3 positions for each token, in each of the batch's 3 states.
        small += 3 * 3 * batch * session_len * INT
    yield "small_buffers", small, "block pointers, stop words, random states, positions"


def older_cache(
    text: TextDims, settings: Settings, generation: Generation, constants: EngineConstants
) -> CacheShape:
    """Return the layout of the cache: blocks of one size, whole sessions, or pages as in 0.18."""
    rule = generation.cache
    if rule.objects:
        return cache_shape(text, settings, constants)
    tokens = settings.session_len if rule.of == "slots" else settings.cache_block_seq_len
    bits = rule.bits.get(settings.quant_policy, 16)
    extra = 4 if bits < 16 and rule.online_scales else 0
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    block = text.layers * heads * 2 * (bits * text.head_dim // 8 + extra) * tokens
    return CacheShape(block_bytes=block, block_tokens=tokens, step=PAGE)


class LegacyAccount(GroupAccount):
    """The memory account of TurboMind before 0.16.

    ``constants`` are the figures of 0.18, for all figures that are equal in every generation.
    """

    def __init__(
        self, launch: EngineLaunch, constants: EngineConstants, generation: Generation
    ) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        free_at_cache = launch.free_at_cache
        self.model, self.settings, self.vision_load = model, settings, launch.vision_load
        self.generation, self.constants = generation, constants
        #: Bytes of the smallest GPU, of which some versions take a share for the cache.
        self._total = min(gpu.usable for gpu in gpus)
        self.shape = older_cache(model.text, settings, generation, constants)
        #: Units of one torch forward: these servers encode one image at a time.
        self._units = 0
        if model.image_rule is not None and model.vision is not None:
            self._units = self.vision_load.budgeted_units(self.vision_load.units_per_image)
        self._towers = self._tower_terms(len(gpus))
        #: Whether a log's free memory already excludes the buffers.
        self._buffers_given = generation.cache.after_buffers and free_at_cache is not None
        # Before the ratio is known, the sizes are those with a cache that limits no forward: over.
        # `_late` makes the terms again, with the cache that the ratio gives.
        most = max(settings.session_len, _Forward(self, 1).buffer_tokens)
        forward = _Forward(self, most)
        if generation.cache.grows:
            self.grown = ("kv_cache",)
        if generation.cache.objects:
            # The longest warm-up request waits for blocks: with fewer blocks, the start never ends.
            tokens = _Forward(self, settings.session_len).warmup_tokens
            self.least_blocks = -(-tokens // self.block_tokens)
            self.cache_shortfall = TurbomindAccount.cache_shortfall
        self.engine_warmup = forward.pool(forward.warmup_tokens, forward.warmup_tokens)
        # The peak of loading already includes the memory that torch keeps.
        staged = 0 if generation.staging.kept else self._staged()
        static = [
            StaticMemory(
                before=self._terms_before(i, launch),
                buffers=self._terms_after(i, forward),
                staged=staged if i == 0 else 0,
            )
            for i in range(len(gpus))
        ]
        pool = self._first_request(forward)
        super().__init__(launch, static, pool, self._cases(forward), self._units)
        if generation.cache.after_buffers and free_at_cache is None:
            self.free = min(
                gpu.usable - total_bytes(memory.before) - total_bytes(memory.buffers)
                for gpu, memory in zip(gpus, self._static_memory, strict=True)
            )

    def _tower_terms(self, ranks: int) -> list[Term]:
        """Return the terms of the vision tower's weights on each rank."""
        model, rule = self.model, self.generation.vision
        copies = rule.copies_of(model.architecture)
        note = f"float16 under torch, {rule.placed}"
        note += f"; loading left {copies:g} times the tower's size" if copies > 1 else ""
        tower = model if rule.runs == "torch" else replace(model, vision=None)
        sizes = tower_bytes(tower, ranks, spread=rule.placed == "balanced")
        return [
            term("weights.vision_tower", "weights", int(size * copies), "formula", note)
            for size in sizes
        ]

    def region_at(self, ratio: float) -> int:
        """Return the cache's bytes on each rank.

        A ratio of 1 or more is a number of blocks or sessions. The engine allocates a session at
        the session's first request. All sessions of a batch count, up to the number of the ratio.
        """
        rule, free = self.generation.cache, max(0, self.free)
        if rule.objects:
            return int(free * ratio)
        if rule.of == "slots":
            entries = int(ratio) if ratio >= 1 else int(rule.default)
            blocks = min(entries, self.settings.max_batch_size)
        elif ratio >= 1:
            blocks = int(ratio)
        else:
            blocks = int((self._total if rule.of == "total" else free) * ratio) // self.block_bytes
        return blocks * self.block_bytes

    def _late(self, i: int, ratio: float) -> LateMemory:
        forward = _Forward(self, self.tokens_at(ratio))
        return LateMemory(
            self._terms_after(i, forward), (self._first_request(forward),), self._cases(forward)
        )

    def _terms_before(self, i: int, launch: EngineLaunch) -> tuple[Term, ...]:
        """Return all terms of GPU ``i`` that are in use when the cache is sized."""
        rules, settings = self.generation, self.settings
        note = "made before the cache is sized"
        gemm = term("gemm_workspace", "context", sum(rules.gemm_before), "formula", note)
        tower = self._towers[i : i + 1] if rules.vision.loaded == "before_cache" else []
        context = before_terms(launch, launch.gpus[i], self.constants)
        classes = legacy_weight_classes(self.model, settings.tp, self.constants, rules)
        size = sum(classes.values())
        lines = [*classes.items(), ("rounding", round_up(size, PAGE) - size)]
        weights = [term(f"weights.{name}", "weights", size, "formula") for name, size in lines]
        if i == 0 and rules.staging.kept:
            # The figure is too low if torch's freed blocks do not fit later tensors.
            note = "torch's allocator keeps the memory of moved tensors"
            weights.append(term(_KEPT, "weights", self._staged(), "formula", note))
        layers = [
            replace(buffer, phase="context")
            for buffer in self._buffer_terms(_Forward(self, settings.session_len))
            if buffer.term in rules.first_layers
        ]
        return (*context, gemm, *tower, *weights, *layers)

    def _staged(self) -> int:
        """Return the bytes that torch holds on the first GPU while tensors move to the engine."""
        text, rule, quantised = self.model.text, self.generation.staging, self.model.quantization
        gate, square = rule.gate, rule.square
        if rule.packed and quantised is not None and quantised.method in _FOUR_BIT:
            gate = square = rule.packed
        ranks = self.settings.tp if rule.shared else 1
        rows = rule.embedding * text.vocab / ranks + gate * text.intermediate + square * text.hidden
        return round_up(int(rows * text.hidden * HALF), PAGE)

    def _terms_after(self, i: int, forward: _Forward) -> tuple[Term, ...]:
        """Return the permanent terms after the cache on one GPU, without the pools."""
        if self._buffers_given:
            return ()
        early, kernels = self.generation.first_layers, self.constants.kernel_modules
        note = f"as in {FIRST_CURRENT}: older figures are unknown"
        growth = legacy_constants().pool_growth
        tower = [replace(self._towers[i], phase="buffers")]
        return (
            *(buffer for buffer in self._buffer_terms(forward) if buffer.term not in early),
            term("kernel_modules", "buffers", kernels, "estimate", note),
            term("pool_growth", "buffers", growth, "estimate", "steps of driver pools"),
            *(tower if self.generation.vision.loaded == "after_cache" else ()),
        )

    def _buffer_terms(self, forward: _Forward) -> list[Term]:
        return [
            term(name, "buffers", round_up(size, PAGE), "formula", note)
            for name, size, note in _buffers(self, forward)
        ]

    def _first_request(self, forward: _Forward) -> Term:
        """Return the term of the bytes that pools keep after the warm-up and the first image.

        The image is the largest that the checkpoint's own limit and the clients' limit admit.
        """
        rule = self.model.image_rule
        tokens, units = forward.warmup_tokens, 0
        note = f"warm-up with {tokens} tokens" if tokens else "no warm-up"
        if rule is not None and self._units:
            units = min(rule.worst_units(), self._units)
            prompt = min(rule.unit_tokens(units) + PROMPT, forward.tokens)
            tokens = max(tokens, prompt)
            note += f"; the first image, {counted(units, 'unit')}"
        size = forward.pool(tokens, tokens) + self._tower(units, flash=True)
        return term(POOL_WARMUP, "buffers", size, "estimate", note)

    def _cases(self, forward: _Forward) -> tuple[Term, ...]:
        """Return the whole pools of torch and TurboMind together, in each worst case."""
        rows = self.settings.max_batch_size
        image = self._tower(self._units, flash=False)
        text = forward.pool(forward.tokens, forward.context)
        batch = text + round_up(forward.batch(rows), PAGE)
        cases = [
            ("text_prefill", text, "longest prompts fill a forward"),
            ("sampling", batch, f"{counted(rows, 'row')} with top_k=0"),
        ]
        if self._units:
            prompt = min(self.vision_load.tokens_per_request + PROMPT, forward.context)
            request = forward.pool(min(forward.tokens, prompt), prompt) + image
            cases.append(("vision_request", request, f"{counted(self._units, 'unit')}, one image"))
            cases.append(
                ("vision_forward", batch + image, "an image in a forward with the longest prompts")
            )
        return transients(
            [
                (name, size, "estimate" if name.startswith("vision") else "formula", note)
                for name, size, note in cases
            ]
        )

    def _tower(self, units: int, *, flash: bool) -> int:
        """Return the bytes of torch's pool after a forward of the tower with ``units`` units."""
        if self.generation.vision.runs != "torch":
            return 0
        return round_up(tower_activations(self.model, units, flash=flash), PAGE)


class LegacyTurbomind(Turbomind):
    """TurboMind before 0.18."""

    def __init__(self, version: str) -> None:
        super().__init__(FIRST_CURRENT)
        self.version = version
        self.generation: Generation = generation_of(version)
        self.pinned_call = ""

    def defaults(self, gpu_name: str) -> dict[str, object]:
        rules = self.generation
        return {
            "cache_max_entry_count": rules.cache.default,
            "max_batch_size": batch_size(rules.batch, gpu_name),
            "max_prefill_token_num": rules.prefill,
            "cache_block_seq_len": rules.cache.block_tokens,
        }

    def account(self, launch: EngineLaunch) -> Account:
        """Make the account; versions with a native tower (0.16, 0.17) use the account of 0.18."""
        generation = self.generation
        if generation.vision.runs != "native":
            return LegacyAccount(launch, self.constants, generation)
        older = replace(
            older_layouts(self.constants, generation),
            version=generation.first,
            gemm_workspace=(),
            gemm_in_context=generation.gemm_before,
            copied_16bit=generation.copied_16bit,
        )
        return TurbomindAccount(launch, older)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """Return why the loaders cannot divide the model, or None.

        A tower that torch runs is not divided.
        """
        if self.generation.vision.runs != "native":
            model = replace(model, vision=None)
        rules, text = self.generation, model.text
        group = model.quantization.group_size if model.quantization else 1
        if rules.power_of_two and tp & (tp - 1):
            return f"LMDeploy {self.version} takes only powers of two as tp"
        if problem := rules.kv_heads_problem(text.kv_heads, tp):
            return f"LMDeploy {self.version} {problem}"
        if rules.ffn_align is None and text.intermediate // group % tp:
            return f"the MLP's {text.intermediate} channels do not divide by {tp}"
        return super().tp_problem(model, tp)

    def problem(self, launch: EngineLaunch) -> str | None:
        """Return why the options are refused, or None.

        If an old cache consists of blocks, a ratio of 1 or more is a number of blocks.
        """
        settings, bits = launch.settings, self.generation.cache.bits
        if settings.quant_policy == _INT8 and _INT8 not in bits:
            four = next(policy for policy, size in bits.items() if size == _INT8)
            return (
                f"LMDeploy {self.version} has no `--quant-policy {_INT8}`: its 8-bit cache is"
                f" `--quant-policy {four}`"
            )
        if settings.cache_max_entry_count >= 1 and not self.generation.cache.objects:
            settings = replace(settings, cache_max_entry_count=0.5)  # checks the other options
        return super().problem(replace(launch, settings=settings))

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """Return the most units in one forward; torch's tower runs one image at a time."""
        if self.generation.vision.runs == "native":
            return super().units_bound(rule, vision_load, settings)
        return vision_load.units_per_image

    def cache(self, model: Model, settings: Settings) -> CacheShape:
        return older_cache(model.text, settings, self.generation, self.constants)

    def weights(self, model: Model, tp: int) -> RankWeights:
        """Return a rank's weights: the text model's by the generation, the tower's as in 0.18."""
        classes = legacy_weight_classes(model, tp, self.constants, self.generation)
        tower = super().weights(model, tp).vision
        return rank_weights({**classes, "vision": tower})

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Return the host memory as in 0.18, and the pixels that only some older versions pin.

        In these versions, each rank also pins the pixels of two whole forwards.
        """
        memory = super().host_memory(model, settings, units_per_forward=units_per_forward)
        # These buffers exist only for tiles; a unit of one tower token is a patch.
        if not self.generation.vision.pinned_pixels or model.unit_tower_tokens == 1:
            return memory
        tokens = settings.max_prefill_token_num + settings.max_batch_size
        pixels = 2 * model.pixel_bytes(tokens)
        return replace(memory, pinned=memory.pinned + pixels * settings.tp)
