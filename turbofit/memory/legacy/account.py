"""The account of TurboMind before 0.18: the same ledger, with the rules of the generation.

Others hold ``used``; then the context, the communicator and the GEMM workspace, the torch tower
where it comes first, the weights, the cache, and the buffers. What torch keeps of the first image
and what the language model's pool keeps of it are ``pool_warmup``: most of these versions have no
warm-up of their own, so ``steady`` is a server that has answered one image at its default limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import round_up
from turbofit.memory.exposure import Exposure, engine_bound
from turbofit.memory.legacy.buffers import legacy_buffers
from turbofit.memory.legacy.cache import LegacyCache
from turbofit.memory.legacy.forward import LegacyForward
from turbofit.memory.legacy.generations import Generation, legacy_constants
from turbofit.memory.legacy.tower import tower_activations, tower_bytes
from turbofit.memory.turbomind.account import Account
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.terms import before_terms, cache_terms
from turbofit.memory.turbomind.weights import weight_classes
from turbofit.model.images import unit_tokens, worst_units

__all__ = ["LegacyAccount", "legacy_account"]

#: Layouts of packed weights that depend on the card came with 0.18: the plain one everywhere.
_PLAIN: Final = (8, 0)
#: Text tokens of the first request around its image.
_FIRST_PROMPT: Final = 64
_HALF: Final = 2


def legacy_account(
    model: Model,
    settings: Settings,
    gpus: Sequence[Gpu],
    machine: Machine,
    exposure: Exposure,
    constants: EngineConstants,
    margins: Sequence[int],
    generation: Generation,
    free_at_cache: int | None = None,
) -> Account:
    """The account of one group under one generation; see :class:`LegacyAccount`.

    Where the tower is native (0.16 and 0.17) the account is 0.18's with that generation's
    paddings and workspaces.
    """
    if generation.vision.runs == "native":
        older = replace(
            constants,
            version=generation.first,
            ffn_align_16bit=generation.ffn_align_16bit,
            gemm_workspace=generation.gemm_before,
        )
        return Account(model, settings, gpus, machine, exposure, older, margins, free_at_cache)
    return LegacyAccount(
        model, settings, gpus, machine, exposure, constants, margins, generation, free_at_cache
    )


class LegacyAccount(Account):
    """One model under one set of settings on one group of GPUs, before 0.16.

    Args:
        model: the checkpoint.
        settings: the engine's options; a ``cache_max_entry_count`` of 1 or more counts blocks.
        gpus: the group's GPUs, first the one that stages the load and holds an undivided tower.
        machine: for the links inside the group.
        exposure: what clients can ask of the vision tower.
        constants: 0.18's figures, for what no generation changed (contexts, NCCL, pages).
        margins: bytes to leave free, one for each GPU.
        generation: the rules of the version.
        free_at_cache: free bytes when the cache was sized, as a log said; replaces all before it.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        gpus: Sequence[Gpu],
        machine: Machine,
        exposure: Exposure,
        constants: EngineConstants,
        margins: Sequence[int],
        generation: Generation,
        free_at_cache: int | None = None,
    ) -> None:
        self.model, self.settings, self.generation = model, settings, generation
        self.gpus, self.exposure = tuple(gpus), exposure
        self.constants, self.margins = constants, tuple(margins)
        self.units_per_forward = self._units()
        self._forward = LegacyForward(model, settings, generation, constants, legacy_constants())
        total = min(self._usable(i) for i in range(len(self.gpus)))
        self._cache = LegacyCache(model.text, settings, generation, constants, total)
        self.shape = self._cache.shape
        self._warmup = self._first_request()
        self.transients = self._cases()
        self._worst = max(term.bytes for term in self.transients)
        self._temporaries = 0
        self._towers = self._tower_terms()
        self._before = self._before_cache(machine, free_at_cache)
        self._before_bytes = [_total(terms) for terms in self._before]
        self._loading, self._staging = 0, self._staged() if free_at_cache is None else 0
        self._buffers = [self._buffer_terms(i, settings.session_len) for i in self._ranks]
        self._buffer_bytes = [_total(terms) for terms in self._buffers]
        after = generation.cache.after_buffers and free_at_cache is None
        held = [
            before + (buffers if after else 0)
            for before, buffers in zip(self._before_bytes, self._buffer_bytes, strict=True)
        ]
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(self._usable(i) - held[i] for i in self._ranks)
        self._best = None

    @property
    def blocks_for_warmup(self) -> int:
        """KV blocks that start-up needs: these versions refuse to run with none at all."""
        return 1

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank; a ratio of 1 or more counts blocks."""
        return self._cache.region(self.free, ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds."""
        return self._cache.tokens(self.region_at(ratio))

    def blocks_at(self, ratio: float) -> int:
        """KV blocks, as these versions log them (``max_block_count``)."""
        return self.region_at(ratio) // self.shape.block_bytes

    def hangs_at(self, ratio: float) -> bool:
        """Whether not even one block fits: these versions then stop with an error."""
        return self.blocks_at(ratio) < self.blocks_for_warmup

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        ledgers = self.at(ratio).ledgers
        return max(0, *(ledger.margin - ledger.headroom for ledger in ledgers))

    @property
    def _ranks(self) -> range:
        return range(len(self.gpus))

    def _units(self) -> int:
        """Units of the vision tower in one forward: images are encoded one request at a time."""
        rule, exposure = self.model.image_rule, self.exposure
        if rule is None or not exposure.units_per_image or self.model.vision is None:
            return 0
        bound = min(exposure.units_per_image, engine_bound(rule, exposure, self.settings))
        paid = exposure.units_per_forward
        return bound if paid is None else min(bound, paid)

    def _tower(self, units: int, *, flash: bool) -> int:
        """Bytes of torch's pool after a forward of so many units."""
        if not units or self.model.vision is None or self.generation.vision.runs != "torch":
            return 0
        size = tower_activations(self.model.vision, units, legacy_constants(), flash=flash)
        return round_up(size, self.constants.pool_granularity)

    def _first_request(self) -> Term:
        """The engine's warm-up, and what the first image at the checkpoint's own limit leaves."""
        forward, rule = self._forward, self.model.image_rule
        tokens, units = forward.warmup_tokens, 0
        note = f"warm-up with {tokens} tokens" if tokens else "no warm-up of its own"
        if rule is not None and self.exposure.units_per_image:
            units = min(worst_units(rule), self.exposure.units_per_image)
            prompt = min(unit_tokens(rule, units) + _FIRST_PROMPT, forward.tokens)
            tokens = max(tokens, prompt)
            note += f"; the first image, {units} units"
        size = forward.pool(tokens, tokens) + self._tower(units, flash=True)
        return Term(term="pool_warmup", phase="buffers", bytes=size, basis="estimate", note=note)

    def _cases(self) -> tuple[Term, ...]:
        """The pools' full size in each worst case, torch's and TurboMind's together."""
        forward, rows = self._forward, self.settings.max_batch_size
        image = self._tower(self.units_per_forward, flash=False)
        text = forward.pool(forward.tokens, max(forward.tokens, self.settings.session_len))
        batch = text + forward.sampling(rows) + forward.decoding(rows)
        cases = [
            ("text_prefill", text, "longest prompts fill a forward"),
            ("sampling", batch, f"{rows} rows with top_k=0"),
        ]
        if self.units_per_forward:
            prompt = self.exposure.tokens_per_request + _FIRST_PROMPT
            tokens = min(forward.tokens, prompt)
            request = forward.pool(tokens, prompt) + image
            cases.append(("vision_request", request, f"{self.units_per_forward} units, one image"))
            cases.append(("vision_forward", batch + image, "images beside the longest prompts"))
        sizes = [size for _, size, _ in cases]
        decides = sizes.index(max(sizes))
        return tuple(
            Term(
                term=name,
                phase="transient",
                bytes=size,
                basis="estimate" if name.startswith("vision") else "formula",
                note=note,
                worst=index == decides,
            )
            for index, (name, size, note) in enumerate(cases)
        )

    def _tower_terms(self) -> list[Term]:
        """The torch tower on each GPU."""
        shares = tower_bytes(self.model, len(self.gpus), self.generation.vision, legacy_constants())
        note = f"float16 under torch, {self.generation.vision.placed}"
        return [
            Term(
                term="weights.vision_tower",
                phase="weights",
                bytes=size,
                basis="formula",
                note=note,
            )
            for size in shares
        ]

    def _before_cache(self, machine: Machine, free_at_cache: int | None) -> list[list[Term]]:
        """Everything that is not free when the cache is sized, by GPU."""
        if free_at_cache is not None:
            return [[_given(gpu, free_at_cache)] for gpu in self.gpus]
        linked = all(
            machine.link(a.index, b.index).nvlinked
            for k, a in enumerate(self.gpus)
            for b in self.gpus[:k]
        )
        weights = self._weight_terms()
        first = self.generation.vision.loaded == "before_cache"
        gemm = Term(
            term="gemm_workspace",
            phase="context",
            bytes=sum(self.generation.gemm_before),
            basis="formula",
            note="made before the cache is sized",
        )
        return [
            [
                *before_terms(gpu, self.settings, False, linked, self.constants),
                gemm,
                *([self._towers[i]] if first else []),
                *weights,
            ]
            for i, gpu in enumerate(self.gpus)
        ]

    def _weight_terms(self) -> list[Term]:
        """The language model's weights on one rank."""
        text, tp = self.model.text, self.settings.tp
        classes = weight_classes(replace(self.model, vision=None), tp, self.constants, _PLAIN)
        if self.generation.embeddings == "replicated":
            whole = round_up(text.vocab, tp) * text.hidden * _HALF
            classes |= {"embedding": whole, "lm_head": whole}
        total = sum(classes.values())
        rounding = round_up(total, self.constants.pool_granularity) - total
        return [
            Term(term=f"weights.{name}", phase="weights", bytes=size, basis="formula")
            for name, size in (*classes.items(), ("rounding", rounding))
        ]

    def _staged(self) -> int:
        """What torch holds on the first GPU while it moves the widest tensor."""
        text = self.model.text
        widest = max(text.vocab * text.hidden, text.hidden * 2 * text.intermediate) * _HALF
        return round_up(self.generation.load_staging * widest, self.constants.pool_granularity)

    def _buffer_terms(self, i: int, session_len: int) -> list[Term]:
        """What lives after the cache on one GPU, without the pools."""
        lines = legacy_buffers(
            self.model, self.settings, self.generation, self._forward, session_len
        )
        terms = [
            Term(
                term=name,
                phase="buffers",
                bytes=round_up(size, self.constants.pool_granularity),
                basis="formula",
                note=note,
            )
            for name, size, note in lines
        ]
        if self.generation.vision.loaded == "after_cache":
            terms.append(replace(self._towers[i], phase="buffers"))
        return terms

    def _session_at(self, region: int) -> int:
        """``session_len`` as the engine truncates it to its cache."""
        wanted = self.settings.session_len
        if not self.generation.cache.truncates_session:
            return wanted
        if self.generation.cache.after_buffers:
            return wanted
        return min(wanted, max(1, self._cache.tokens(region)))

    def _ledger(self, i: int, region: int, ratio: float) -> GpuLedger:
        gpu = self.gpus[i]
        rounded = round_up(region, self.constants.pool_granularity)
        kept = [
            *self._before[i],
            *cache_terms(rounded, ratio, 0),
            *self._buffer_terms(i, self._session_at(region)),
        ]
        pool = max(self._warmup.bytes, self._worst)
        steady = _total(kept) + self._warmup.bytes
        peak = _total(kept) + pool
        load_peak = self._before_bytes[i] + (self._staging if i == 0 else 0)
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=known(gpu.total, 0),
            reserved=known(gpu.reserved, 0),
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            ledger=(*kept, self._warmup, *self.transients),
            steady=steady,
            load_peak=load_peak,
            peak=peak,
            headroom=self._usable(i) - max(peak, load_peak),
            margin=self.margins[i],
        )


def _given(gpu: Gpu, free: int) -> Term:
    """Everything before the cache as one line, from the free memory that a log told."""
    before = known(gpu.total, 0) - known(gpu.reserved, 0) - free
    note = "all that is not free when the cache is sized"
    return Term(term="before_cache", phase="before", bytes=before, basis="measured", note=note)


def _total(terms: Sequence[Term]) -> int:
    return sum(term.bytes for term in terms)
