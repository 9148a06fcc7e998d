"""TurboMind's account: every byte of one tensor-parallel group at any cache ratio.

Others hold ``used``; then come the CUDA context and the communicator, then the weights. Then free
memory is read, the smallest of the group counts, and a ratio of it becomes the cache. Persistent
buffers, the warm-up and the requests must live in what the ratio left.
"""

from __future__ import annotations

from collections.abc import Sequence

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings, Term
from turbofit.core.struct import Struct, known
from turbofit.core.units import round_up
from turbofit.memory.exposure import Exposure, engine_bound
from turbofit.memory.turbomind.cache import cache_shape, region_bytes, tokens_held
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.loading import loading_extra, staging_bytes, temporary_bytes
from turbofit.memory.turbomind.pool import PoolModel
from turbofit.memory.turbomind.terms import (
    FUSES_NOTHING,
    before_terms,
    buffer_terms,
    cache_terms,
    capability_of,
    transient_terms,
    warmup_term,
    warmup_tokens,
    weight_terms,
)

__all__ = ["RATIO_STEPS", "Account", "Outcome"]

#: A plan's ratio is a multiple of one thousandth.
RATIO_STEPS = 1000


class Outcome(Struct):
    """A group at one ratio: what the engine sees as free, its cache, and each GPU's ledger."""

    ratio: float
    free: int
    region: int
    tokens: int
    ledgers: tuple[GpuLedger, ...]

    @property
    def fits(self) -> bool:
        """Whether every GPU keeps its margin."""
        return all(ledger.fits for ledger in self.ledgers)


class Account:
    """One model under one set of settings on one group of GPUs.

    Args:
        model: the checkpoint.
        settings: the engine's options; the ratio comes later, in :meth:`at`.
        gpus: the group's GPUs, first the one that stages the load.
        machine: for the links inside the group.
        exposure: what clients can ask of the vision tower.
        constants: the engine generation's figures.
        margins: bytes to leave free, one for each GPU.
        free_at_cache: free bytes when the cache is sized, as a log said; replaces all before it.
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
        free_at_cache: int | None = None,
    ) -> None:
        self.settings = settings
        self.gpus = tuple(gpus)
        self.exposure = exposure
        self.constants = constants
        self.margins = tuple(margins)
        self.shape = cache_shape(model.text, settings, constants)
        self.units_per_forward = _units_per_forward(model, exposure, settings)
        fuses = capability_of(self.gpus[0], unknown=FUSES_NOTHING)
        pool = PoolModel(model, settings, constants, fuses)
        self.transients = transient_terms(
            pool, model.image_rule, settings, exposure, self.units_per_forward, constants
        )
        self._worst = max(term.bytes for term in self.transients)
        self._warmup = warmup_term(pool, settings, constants)
        self._buffers = [buffer_terms(model, settings, gpu, constants) for gpu in self.gpus]
        if free_at_cache is None:
            capability = capability_of(self.gpus[0])
            temporaries = temporary_bytes(model, settings, constants, capability)
            self._temporaries = round_up(temporaries, constants.pool_granularity)
            self._loading = round_up(
                loading_extra(model, settings, constants, capability), constants.pool_granularity
            )
            self._staging = staging_bytes(model, settings, constants)
            linked = _nvlinked(machine, self.gpus)
            weights = weight_terms(model, settings, self._temporaries, constants, capability)
            self._before = [
                [*before_terms(gpu, settings, i == 0, linked, constants), *weights]
                for i, gpu in enumerate(self.gpus)
            ]
        else:
            self._temporaries = self._staging = self._loading = 0
            self._before = [[_given(gpu, free_at_cache)] for gpu in self.gpus]
        self._before_bytes = [_total(terms) for terms in self._before]
        self._buffer_bytes = [_total(terms) for terms in self._buffers]
        #: Free bytes that the engine sees when it sizes the cache; negative where nothing is left.
        self.free = min(self._usable(i) - self._before_bytes[i] for i in range(len(self.gpus)))
        self._best: float | None = None

    @property
    def blocks_for_warmup(self) -> int:
        """KV blocks that the longest warm-up request needs: with fewer, start-up never ends."""
        tokens = warmup_tokens(self.settings, self.constants)
        return -(-tokens // self.shape.block_tokens)

    def best_ratio(self) -> float | None:
        """The largest multiple of 0.001 that leaves every margin; None where no cache fits."""
        if self._best is not None:
            return self._best or None
        self._best = self._find_ratio()
        return self._best or None

    def _find_ratio(self) -> float:
        """The best ratio, 0 where there is none."""
        if self.free <= 0 or not self._loads():
            return 0.0
        room = min(self._room(i) for i in range(len(self.gpus)))
        steps = min(RATIO_STEPS - 1, max(0, room) * RATIO_STEPS // self.free)
        while steps > 0 and not self.fits_at(steps / RATIO_STEPS):
            steps -= 1
        return steps / RATIO_STEPS

    def fits_at(self, ratio: float) -> bool:
        """Whether every GPU keeps its margin at this ratio."""
        return self.missing_at(ratio) == 0

    def missing_at(self, ratio: float) -> int:
        """Bytes by which the tightest GPU misses its margin at this ratio; 0 where none does."""
        cache = self._cache_bytes(self.region_at(ratio), ratio)
        gpus = range(len(self.gpus))
        serving = max(cache - self._room(i) for i in gpus)
        loading = max(self._load_peak(i) + self.margins[i] - self._usable(i) for i in gpus)
        return max(0, serving, loading)

    def region_at(self, ratio: float) -> int:
        """Bytes of the cache on each rank."""
        return region_bytes(max(0, self.free), ratio)

    def tokens_at(self, ratio: float) -> int:
        """KV tokens that the cache holds, at least."""
        return tokens_held(self.region_at(ratio), self.shape, self.constants)

    def hangs_at(self, ratio: float) -> bool:
        """Whether the cache is smaller than one warm-up request: LMDeploy then waits for ever."""
        return self.tokens_at(ratio) // self.shape.block_tokens < self.blocks_for_warmup

    def at(self, ratio: float) -> Outcome:
        """The whole account at one ratio."""
        region = self.region_at(ratio)
        return Outcome(
            ratio=ratio,
            free=self.free,
            region=region,
            tokens=self.tokens_at(ratio),
            ledgers=tuple(self._ledger(i, region, ratio) for i in range(len(self.gpus))),
        )

    def _usable(self, i: int) -> int:
        return known(self.gpus[i].total, 0) - known(self.gpus[i].reserved, 0)

    def _cache_bytes(self, region: int, ratio: float) -> int:
        """The cache as the driver holds it, with the doubt about the temporaries."""
        rounded = round_up(region, self.constants.pool_granularity)
        return rounded + int(self._temporaries * ratio)

    def _room(self, i: int) -> int:
        """Bytes that the cache may take on one GPU."""
        held = self._before_bytes[i] - self._temporaries + self._buffer_bytes[i]
        pool = max(self._warmup.bytes, self._worst)
        return self._usable(i) - self.margins[i] - held - pool

    def _loads(self) -> bool:
        return all(
            self._load_peak(i) + self.margins[i] <= self._usable(i) for i in range(len(self.gpus))
        )

    def _load_peak(self, i: int) -> int:
        """The most that one GPU holds while loading; the first stages tensors through torch."""
        held = self._before_bytes[i] - self._temporaries
        staged = self._loading + (self._staging if i == 0 else 0)
        return held + max(staged, self._temporaries)

    def _ledger(self, i: int, region: int, ratio: float) -> GpuLedger:
        gpu = self.gpus[i]
        rounded = round_up(region, self.constants.pool_granularity)
        body = [
            *self._before[i],
            *cache_terms(rounded, ratio, self._temporaries),
            *self._buffers[i],
            self._warmup,
        ]
        steady = _total(body)
        peak = steady - self._warmup.bytes + max(self._warmup.bytes, self._worst)
        load_peak = self._load_peak(i)
        return GpuLedger(
            index=gpu.index,
            uuid=gpu.uuid,
            name=gpu.name,
            total=known(gpu.total, 0),
            reserved=known(gpu.reserved, 0),
            used=known(gpu.used, 0),
            free=known(gpu.free, 0),
            ledger=(*body, *self.transients),
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


def _units_per_forward(model: Model, exposure: Exposure, settings: Settings) -> int:
    """The units that the peak pays for: the engine's own bound, or less where the plan says so."""
    if model.image_rule is None or not exposure.units_per_image:
        return 0
    bound = engine_bound(model.image_rule, exposure, settings)
    paid = exposure.units_per_forward
    return bound if paid is None else min(bound, paid)


def _nvlinked(machine: Machine, gpus: Sequence[Gpu]) -> bool:
    """Whether every pair of the group is joined by NVLink."""
    return all(
        machine.link(a.index, b.index).nvlinked for k, a in enumerate(gpus) for b in gpus[:k]
    )


def _total(terms: Sequence[Term]) -> int:
    return sum(term.bytes for term in terms)
