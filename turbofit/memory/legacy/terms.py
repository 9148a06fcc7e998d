"""The named lines of an older TurboMind's ledger, in the order in which it takes the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Term
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.buffers import legacy_buffers
from turbofit.memory.legacy.forward import LegacyForward
from turbofit.memory.legacy.generations import Generation, legacy_constants
from turbofit.memory.legacy.tower import tower_activations, tower_bytes
from turbofit.memory.legacy.weights import legacy_weight_classes
from turbofit.memory.shared_terms import POOL_WARMUP, capability_of, transients
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.terms import before_terms
from turbofit.memory.vision_load import VisionLoad

__all__ = ["LegacyTerms"]

#: Text tokens of a request around its images.
_PROMPT: Final = 64


class LegacyTerms:
    """Terms of one group under one generation, see `legacy_account`."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        gpus: Sequence[Gpu],
        vision_load: VisionLoad,
        constants: EngineConstants,
        generation: Generation,
    ) -> None:
        self._model, self._settings, self._gpus = model, settings, tuple(gpus)
        self._vision_load, self._constants = vision_load, constants
        self._generation, self._legacy = generation, legacy_constants()
        self._page = constants.pool_granularity
        held = generation.vision.held(model.architecture)
        self._towers = [
            Term(
                term="weights.vision_tower",
                phase="weights",
                bytes=int(size * held),
                basis="formula",
                note=f"float16 under torch, {generation.vision.placed}"
                + (f"; loading left {held:g} times its size" if held > 1 else ""),
            )
            for size in tower_bytes(model, len(gpus), generation.vision, self._legacy)
        ]

    def forward(self, held: int) -> LegacyForward:
        """The forwards of an engine whose cache holds so many tokens."""
        return LegacyForward(
            self._model, self._settings, self._generation, self._constants, self._legacy, held
        )

    @property
    def units_per_forward(self) -> int:
        """Units of one torch forward: these servers encode one image at a time."""
        if self._model.image_rule is None or self._model.vision is None:
            return 0
        return self._vision_load.budgeted_units(self._vision_load.units_per_image)

    def before(self, i: int, machine: Machine) -> tuple[Term, ...]:
        """Everything of one GPU that is not free when the cache is sized."""
        linked = machine.nvlinked(self._gpus)
        gemm = Term(
            term="gemm_workspace",
            phase="context",
            bytes=sum(self._generation.gemm_before),
            basis="formula",
            note="made before the cache is sized",
        )
        tower = self._towers[i : i + 1]
        if self._generation.vision.loaded != "before_cache":
            tower = []
        context = before_terms(self._gpus[i], self._settings, False, linked, self._constants)
        kept = [self._kept()] if i == 0 and self._generation.staging.kept else []
        layers = [
            replace(term, phase="context")
            for term in self._buffer_terms(self.forward(self._settings.session_len))
            if term.term in self._generation.first_layers
        ]
        return (*context, gemm, *tower, *self._weights(), *kept, *layers)

    def _kept(self) -> Term:
        """What torch does not give back: under where its blocks do not fit each other's."""
        return Term(
            term="torch_cache",
            phase="weights",
            bytes=self.staged(),
            basis="formula",
            note="torch's allocator keeps what moving tensors took",
        )

    def _weights(self) -> list[Term]:
        """The language model's weights on one rank."""
        classes = legacy_weight_classes(
            self._model, self._settings.tp, self._constants, self._generation
        )
        total = sum(classes.values())
        lines = [*classes.items(), ("rounding", round_up(total, self._page) - total)]
        return [
            Term(term=f"weights.{name}", phase="weights", bytes=size, basis="formula")
            for name, size in lines
        ]

    def staged(self) -> int:
        """What torch holds on the first GPU while it moves tensors."""
        text, rule = self._model.text, self._generation.staging
        rows = rule.embedding * text.vocab + rule.gate * text.intermediate
        rows += rule.square * text.hidden
        return round_up(rows * text.hidden * HALF, self._page)

    def buffers(self, i: int, forward: LegacyForward) -> tuple[Term, ...]:
        """What lives after the cache on one GPU, without the pools."""
        terms = [
            term
            for term in self._buffer_terms(forward)
            if term.term not in self._generation.first_layers
        ]
        terms += self._driver_terms(i)
        if self._generation.vision.loaded == "after_cache":
            terms.append(replace(self._towers[i], phase="buffers"))
        return tuple(terms)

    def _driver_terms(self, i: int) -> Iterator[Term]:
        """What the driver adds, as in 0.18's account: its figures for want of older ones."""
        major, minor = capability_of(self._gpus[i])
        images, wanted = self._constants.kernel_images, major * 10 + minor
        image = images[max((key for key in images if key <= wanted), default=max(images))]
        lines = (
            ("kernel_modules", image, "TurboMind's kernels, as large as in the 0.18 wheel"),
            ("pool_growth", self._constants.pool_growth, "steps of driver pools"),
        )
        for name, size, note in lines:
            yield Term(term=name, phase="buffers", bytes=size, basis="estimate", note=note)

    def _buffer_terms(self, forward: LegacyForward) -> list[Term]:
        lines = legacy_buffers(self._model, self._settings, self._generation, forward)
        return [
            Term(
                term=name,
                phase="buffers",
                bytes=round_up(size, self._page),
                basis="formula",
                note=note,
            )
            for name, size, note in lines
        ]

    def first_request(self, forward: LegacyForward) -> Term:
        """The engine's warm-up, and what the first image at the checkpoint's own limit leaves."""
        rule = self._model.image_rule
        tokens, units = forward.warmup_tokens, 0
        note = f"warm-up with {tokens} tokens" if tokens else "no warm-up of its own"
        if rule is not None and self.units_per_forward:
            units = min(rule.worst_units(), self.units_per_forward)
            prompt = min(rule.unit_tokens(units) + _PROMPT, forward.tokens)
            tokens = max(tokens, prompt)
            note += f"; the first image, {units} units"
        size = forward.pool(tokens, tokens) + self._tower(units, flash=True)
        return Term(term=POOL_WARMUP, phase="buffers", bytes=size, basis="estimate", note=note)

    def cases(self, forward: LegacyForward) -> tuple[Term, ...]:
        """The pools' full size in each worst case, torch's and TurboMind's together."""
        rows = self._settings.max_batch_size
        image = self._tower(self.units_per_forward, flash=False)
        text = forward.pool(forward.tokens, forward.context)
        batch = text + round_up(forward.sampling(rows) + forward.decoding(rows), self._page)
        cases = [
            ("text_prefill", text, "longest prompts fill a forward"),
            ("sampling", batch, f"{rows} rows with top_k=0"),
        ]
        if self.units_per_forward:
            prompt = min(self._vision_load.tokens_per_request + _PROMPT, forward.context)
            request = forward.pool(min(forward.tokens, prompt), prompt) + image
            cases.append(("vision_request", request, f"{self.units_per_forward} units, one image"))
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
        if not units or vision is None or self._generation.vision.runs != "torch":
            return 0
        return round_up(tower_activations(vision, units, self._legacy, flash=flash), self._page)
