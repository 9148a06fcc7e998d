"""The account of TurboMind before 0.18: the same ledger, with the rules of its generation.

Others hold ``used``; then the context, the communicator and the GEMM workspace, the torch tower
where it comes first, the weights, the cache, and the buffers. What torch keeps of the first image
and what the language model's pool keeps of it are ``pool_warmup``: most of these versions have no
warm-up of their own, so ``steady`` is a server that has answered one image at its default limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.plan import Settings, Term
from turbofit.core.units import HALF, round_up
from turbofit.memory.account import Account, LateMemory, StaticMemory, given, total_bytes
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.legacy.forward import LegacyCache, LegacyForward, legacy_buffers
from turbofit.memory.legacy.generations import Generation, legacy_constants
from turbofit.memory.legacy.weights import (
    legacy_weight_classes,
    older_layouts,
    tower_activations,
    tower_bytes,
)
from turbofit.memory.shared_terms import PAGE, POOL_WARMUP, term, transients
from turbofit.memory.turbomind.account import TurbomindAccount, before_terms, cache_terms
from turbofit.memory.turbomind.constants import EngineConstants

__all__ = ["GroupAccount", "LegacyAccount", "legacy_account"]

#: What torch keeps of loading: part of ``before``, and of its peak.
_KEPT = "torch_cache"

#: Text tokens of a request around its images.
_PROMPT: Final = 64


class GroupAccount(Account):
    """What the accounts of all older engines add to the common one.

    What the allocators keep of the first image is part of ``pool_warmup``, as most of them warm
    nothing up; and what comes after the cache can depend on it.

    Args:
        settings: the engine's options; the ratio comes later, in :meth:`at`.
        gpus: the group's GPUs.
        margins: bytes to leave free, one for each GPU.
        before: each GPU's terms that are there when free memory is read.
        buffers: each GPU's persistent terms after the cache, at their largest.
        pool: what the allocators keep of the warm-up and the first request.
        transients: the alternatives; the largest decides.
        staged: bytes that loading holds on the first GPU above its weights.
        units_per_forward: vision units that the largest transient pays for.
        engine_warmup: bytes of ``pool`` that the engine takes before any request.
    """

    dies: ClassVar[str] = "aborts"
    cache_shortfall: ClassVar[str] = "that it needs at least ({more} more), and LMDeploy stops"
    allocator: ClassVar[str] = "the pools of TurboMind and torch"
    warmup_words: ClassVar[str] = "in LMDeploy's own warm-up or with its first image"
    admits_prompts: ClassVar[bool] = False  # the tower is Python, before the engine

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        settings: Settings,
        gpus: Sequence[Gpu],
        margins: Sequence[int],
        before: Sequence[Sequence[Term]],
        buffers: Sequence[Sequence[Term]],
        pool: Term,
        transients: Sequence[Term],
        staged: int,
        units_per_forward: int,
        engine_warmup: int = 0,
    ) -> None:
        held = []
        for i, (early, late) in enumerate(zip(before, buffers, strict=True)):
            kept = sum(term.bytes for term in early if term.term == _KEPT)
            extra = max(0, staged - kept) if i == 0 else 0
            held.append(StaticMemory(before=tuple(early), buffers=tuple(late), staged=extra))
        super().__init__(settings, gpus, margins, held, pool, transients, units_per_forward)
        self.engine_warmup = engine_warmup

    @property
    def least_blocks(self) -> int:
        """The fewest KV blocks with which the engine starts."""
        return 1

    def cache_terms(self, i: int, ratio: float) -> list[Term]:  # noqa: ARG002 - alike on all GPUs
        """The cache of one GPU as lines of its ledger."""
        return cache_terms(round_up(self.region_at(ratio), PAGE), ratio, 0)

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        return max(0, *(one.margin - one.headroom for one in self.at(ratio).ledgers))


def legacy_account(
    launch: EngineLaunch, constants: EngineConstants, generation: Generation
) -> Account:
    """The account of one engine of one generation; see :class:`LegacyAccount`.

    Where the tower is native (0.16 and 0.17) the account is 0.18's with that generation's
    paddings and workspaces.
    """
    if generation.vision.runs == "native":
        older = replace(
            older_layouts(constants, generation),
            version=generation.first,
            gemm_workspace=(),
            gemm_in_context=generation.gemm_before,
            copied_16bit=generation.copied_16bit,
        )
        return TurbomindAccount(launch, older)
    kind = _WarmedAccount if generation.cache.objects else LegacyAccount
    return kind(launch, constants, generation)


class LegacyAccount(GroupAccount):
    """One model under one set of settings on one group of GPUs, before 0.16.

    Args:
        launch: the engine on its group; the ratio comes later, in :meth:`at`.
        constants: 0.18's figures, for what no generation changed (contexts, NCCL, pages).
        generation: the rules of the version.
    """

    def __init__(
        self, launch: EngineLaunch, constants: EngineConstants, generation: Generation
    ) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        free_at_cache = launch.free_at_cache
        self.generation, self.vision_load, self.constants = (
            generation,
            launch.vision_load,
            constants,
        )
        self._model, self._settings, self._gpus = model, settings, gpus
        self._legacy = legacy_constants()
        held = generation.vision.held(model.architecture)
        note = f"float16 under torch, {generation.vision.placed}"
        note += f"; loading left {held:g} times its size" if held > 1 else ""
        self._towers = [
            term("weights.vision_tower", "weights", int(size * held), "formula", note)
            for size in tower_bytes(model, len(gpus), generation.vision, self._legacy)
        ]
        ranks = range(len(gpus))
        if free_at_cache is None:
            before = [self._terms_before(i, launch.machine) for i in ranks]
        else:
            before = [(given(gpu, free_at_cache),) for gpu in gpus]
        #: Whether the buffers are part of what is not free when a log tells it.
        self._buffers_given = generation.cache.after_buffers and free_at_cache is not None
        # Upper ends: a cache that cuts no session.
        forward = self._forward(max(settings.session_len, self._forward(1).buffer_tokens))
        super().__init__(
            settings,
            gpus,
            launch.margins,
            before,
            [self._buffers(i, forward) for i in ranks],
            self._first_request(forward),
            self._cases(forward),
            self._staged() if free_at_cache is None else 0,
            self._units,
            forward.pool(forward.warmup_tokens, forward.warmup_tokens),
        )
        total = min(gpu.usable for gpu in gpus)
        self._cache = LegacyCache(model.text, settings, generation, constants, total)
        self.shape = self._cache.shape
        if generation.cache.after_buffers and free_at_cache is None:
            self.free = min(
                gpu.usable - total_bytes(one.before) - total_bytes(one.buffers)
                for gpu, one in zip(gpus, self._static_memory, strict=True)
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block on one rank."""
        return self.shape.block_bytes

    @property
    def block_tokens(self) -> int:
        """Tokens of one KV block."""
        return self.shape.block_tokens

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank; a ratio of 1 or more counts blocks."""
        return self._cache.region(self.free, ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds."""
        return self._cache.tokens(self.region_at(ratio))

    def _buffers(self, i: int, forward: LegacyForward) -> tuple[Term, ...]:
        return () if self._buffers_given else self._terms_after(i, forward)

    def _late(self, i: int, ratio: float) -> LateMemory:
        """What one GPU holds after the cache, for the sequences that the cache admits."""
        forward = self._forward(self.tokens_at(ratio))
        return LateMemory(
            self._buffers(i, forward), (self._first_request(forward),), self._cases(forward)
        )

    def _forward(self, held: int) -> LegacyForward:
        """The forwards of an engine whose cache holds so many tokens."""
        return LegacyForward(
            self._model, self._settings, self.generation, self.constants, self._legacy, held
        )

    @property
    def _units(self) -> int:
        """Units of one torch forward: these servers encode one image at a time."""
        if self._model.image_rule is None or self._model.vision is None:
            return 0
        return self.vision_load.budgeted_units(self.vision_load.units_per_image)

    def _terms_before(self, i: int, machine: Machine) -> tuple[Term, ...]:
        """Everything of one GPU that is not free when the cache is sized."""
        linked = machine.nvlinked(self._gpus)
        gemm = term(
            "gemm_workspace",
            "context",
            sum(self.generation.gemm_before),
            "formula",
            "made before the cache is sized",
        )
        tower = self._towers[i : i + 1]
        if self.generation.vision.loaded != "before_cache":
            tower = []
        context = before_terms(self._gpus[i], self._settings, linked, self.constants)
        kept = [self._kept()] if i == 0 and self.generation.staging.kept else []
        layers = [
            replace(term, phase="context")
            for term in self._buffer_terms(self._forward(self._settings.session_len))
            if term.term in self.generation.first_layers
        ]
        return (*context, gemm, *tower, *self._weights(), *kept, *layers)

    def _kept(self) -> Term:
        """What torch does not give back: under where its blocks do not fit each other's."""
        return term(
            "torch_cache",
            "weights",
            self._staged(),
            "formula",
            "torch's allocator keeps what moving tensors took",
        )

    def _weights(self) -> list[Term]:
        """The language model's weights on one rank."""
        classes = legacy_weight_classes(
            self._model, self._settings.tp, self.constants, self.generation
        )
        total = sum(classes.values())
        lines = [*classes.items(), ("rounding", round_up(total, PAGE) - total)]
        return [term(f"weights.{name}", "weights", size, "formula") for name, size in lines]

    def _staged(self) -> int:
        """What torch holds on the first GPU while it moves tensors."""
        text, rule = self._model.text, self.generation.staging
        rows = rule.embedding * text.vocab + rule.gate * text.intermediate
        rows += rule.square * text.hidden
        return round_up(rows * text.hidden * HALF, PAGE)

    def _terms_after(self, i: int, forward: LegacyForward) -> tuple[Term, ...]:
        """What lives after the cache on one GPU, without the pools."""
        terms = [
            term
            for term in self._buffer_terms(forward)
            if term.term not in self.generation.first_layers
        ]
        for name, size, note in (
            ("kernel_modules", self.constants.kernel_modules, "0.18's, for want of older ones"),
            ("pool_growth", self._legacy.pool_growth, "steps of driver pools"),
        ):
            terms.append(term(name, "buffers", size, "estimate", note))
        if self.generation.vision.loaded == "after_cache":
            terms.append(replace(self._towers[i], phase="buffers"))
        return tuple(terms)

    def _buffer_terms(self, forward: LegacyForward) -> list[Term]:
        lines = legacy_buffers(self._model, self._settings, self.generation, forward)
        return [
            term(name, "buffers", round_up(size, PAGE), "formula", note)
            for name, size, note in lines
        ]

    def _first_request(self, forward: LegacyForward) -> Term:
        """The engine's warm-up, and what the first image at the checkpoint's own limit leaves."""
        rule = self._model.image_rule
        tokens, units = forward.warmup_tokens, 0
        note = f"warm-up with {tokens} tokens" if tokens else "no warm-up of its own"
        if rule is not None and self._units:
            units = min(rule.worst_units(), self._units)
            prompt = min(rule.unit_tokens(units) + _PROMPT, forward.tokens)
            tokens = max(tokens, prompt)
            note += f"; the first image, {units} units"
        size = forward.pool(tokens, tokens) + self._tower(units, flash=True)
        return term(POOL_WARMUP, "buffers", size, "estimate", note)

    def _cases(self, forward: LegacyForward) -> tuple[Term, ...]:
        """The pools' full size in each worst case, torch's and TurboMind's together."""
        rows = self._settings.max_batch_size
        image = self._tower(self._units, flash=False)
        text = forward.pool(forward.tokens, forward.context)
        batch = text + round_up(forward.sampling(rows) + forward.decoding(rows), PAGE)
        cases = [
            ("text_prefill", text, "longest prompts fill a forward"),
            ("sampling", batch, f"{rows} rows with top_k=0"),
        ]
        if self._units:
            prompt = min(self.vision_load.tokens_per_request + _PROMPT, forward.context)
            request = forward.pool(min(forward.tokens, prompt), prompt) + image
            cases.append(("vision_request", request, f"{self._units} units, one image"))
            cases.append(("vision_forward", batch + image, "an image beside the longest prompts"))
        return transients(
            [
                (name, size, "estimate" if name.startswith("vision") else "formula", note)
                for name, size, note in cases
            ]
        )

    def _tower(self, units: int, *, flash: bool) -> int:
        """Bytes of torch's pool after a forward of so many units."""
        vision = self._model.vision
        if not units or vision is None or self.generation.vision.runs != "torch":
            return 0
        return round_up(tower_activations(vision, units, self._legacy, flash=flash), PAGE)


class _WarmedAccount(LegacyAccount):
    """Of 0.15: no cut session, and a warm-up whose requests wait for blocks of the cache."""

    cache_shortfall: ClassVar[str] = TurbomindAccount.cache_shortfall

    @property
    def least_blocks(self) -> int:
        """KV blocks that the longest warm-up request needs: with fewer, start-up never ends."""
        forward = self._forward(self.settings.session_len)
        return -(-forward.warmup_tokens // self.block_tokens)
