"""Makes a row's forecast by the account of its engine and generation."""

from __future__ import annotations

from bench.accuracy.rows import Row, machine_of, model_of
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.memory.account import NO_IMAGES, POOL_WARMUP, Engine, EngineLaunch, VisionLoad
from turbofit.memory.engines import engine_named
from turbofit.memory.legacy.pytorch import LegacyPytorch
from turbofit.memory.legacy.turbomind import GroupAccount, LegacyTurbomind


class Forecast(Struct):
    """The forecast of a row: the ledgers of its GPUs, and the cache in blocks.

    ``tokens`` is what the cache holds. ``host`` and ``pinned`` are bytes of host memory.
    ``by_requests``: the bytes of ``steady`` that only requests take: those of the first image, and
    a cache that grows.
    """

    generation: str
    ledgers: tuple[GpuLedger, ...]
    free: int
    region: int
    block_bytes: int
    block_tokens: int
    tokens: int
    host: int
    pinned: int
    cache_shortfall: bool
    by_requests: int = 0

    @property
    def outcome(self) -> str:
        """``ok``, ``oom`` (never serves), or ``oom_on_request`` (a worst-case request ends it)."""
        usable = [one.total - one.reserved for one in self.ledgers]
        starts = all(
            max(one.steady - self.by_requests, one.load_peak) <= room
            for one, room in zip(self.ledgers, usable, strict=True)
        )
        if self.free <= 0 or self.cache_shortfall or not starts:
            return "oom"
        lives = all(one.peak <= room for one, room in zip(self.ledgers, usable, strict=True))
        return "ok" if lives else "oom_on_request"

    @property
    def phase(self) -> str:
        """The first phase that does not fit; "" if all fit."""
        for one in self.ledgers:
            if one.load_peak > one.total - one.reserved:
                return "load"
        if self.outcome == "oom":
            return "start"
        return "request" if self.outcome == "oom_on_request" else ""

    @property
    def has_margin(self) -> bool:
        """Whether each GPU keeps more free than the default margin."""
        return all(one.headroom > one.margin for one in self.ledgers)


def forecast(row: Row) -> Forecast:
    """Return the forecast of a row by the engine of its name and version.

    Raises:
        PackageError: no account of that engine in that version.
    """
    model, machine = model_of(row), machine_of(row)
    gpus = [machine.gpu(index) for index in machine.visible[: row.tp]]
    engine = engine_named(row.engine, row.version)
    settings = _settings(row, model, engine.defaults(gpus[0].name))
    load = _vision_load(row, model)
    account = engine.account(
        EngineLaunch(
            model=model,
            settings=settings,
            gpus=tuple(gpus),
            machine=machine,
            vision_load=load,
            margins=tuple(_margin(gpu) for gpu in gpus),
            free_at_cache=None if row.free_mib is None else int(row.free_mib * MIB),
        )
    )
    ratio = settings.cache_max_entry_count
    ledgers = account.ledgers_at(ratio)
    warmup = next(t.bytes for t in ledgers[0].terms if t.term == POOL_WARMUP)
    rule = model.image_rule
    units = engine.units_bound(rule, load, settings) if rule and load.units_per_image else 0
    host = engine.host_memory(model, settings, units_per_forward=units)
    engine_warmup = account.engine_warmup if isinstance(account, GroupAccount) else warmup
    return Forecast(
        generation=_generation(engine, row.version),
        ledgers=ledgers,
        free=account.free,
        region=account.region_at(ratio),
        block_bytes=account.block_bytes,
        block_tokens=account.block_tokens,
        tokens=account.tokens_at(ratio),
        host=host.pinned + host.pageable,
        pinned=host.pinned,
        cache_shortfall=account.cache_shortfall_at(ratio),
        by_requests=max(0, warmup - engine_warmup)
        + (account.region_at(ratio) if "kv_cache" in account.grown else 0),
    )


def _generation(engine: Engine, version: str) -> str:
    """Return the version that began the engine's generation."""
    if isinstance(engine, LegacyTurbomind | LegacyPytorch):
        return engine.generation.first
    return ".".join(version.split(".")[:2])


def _margin(gpu: Gpu) -> int:
    total = gpu.total if isinstance(gpu.total, int) else 0
    return max(256 * MIB, total // 100)


def _settings(row: Row, model: Model, defaults: dict[str, object]) -> Settings:
    """Return the row's settings, with the generation's defaults for all others."""
    given = dict(row.settings)
    session = int(given.setdefault("session_len", model.text.max_position_embeddings))
    context = int(given.pop("max_context_token_num", 0))
    values = {**defaults, **given}
    if not values["max_prefill_token_num"]:  # older than it; few tokens of context are sessions
        values["max_prefill_token_num"] = context if context >= session else context * session
    ratio = values.pop("cache_max_entry_count")
    return Settings(
        tp=row.tp,
        dtype=model.dtype,
        quant_policy=row.quant_policy,
        cache_max_entry_count=float(str(ratio)),
        **{name: int(str(value).partition(".")[0]) for name, value in values.items()},
    )


def _vision_load(row: Row, model: Model) -> VisionLoad:
    """Return the load of the row's images; by default of one at the checkpoint's own limit."""
    rule = model.image_rule
    if rule is None or model.vision is None:
        return NO_IMAGES
    found = rule.units(*row.size, row.tiles) if row.size else rule.worst_units(row.tiles)
    images = row.images or 1
    tokens = rule.unit_tokens(found) * images
    return VisionLoad(units_per_image=found, images_per_request=images, tokens_per_request=tokens)
