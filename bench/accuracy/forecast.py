"""One row's forecast by the account of its engine and generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.accuracy.inputs import Inputs, MissingError
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.plan import GpuLedger, Settings
from turbofit.core.struct import Struct
from turbofit.core.units import MIB
from turbofit.memory.exposure import NO_IMAGES, Exposure
from turbofit.memory.legacy.account import legacy_account
from turbofit.memory.legacy.generations import generation_of, is_legacy, torch_generation_of
from turbofit.memory.legacy.group import GroupAccount
from turbofit.memory.legacy.pytorch import LegacyTorchAccount
from turbofit.memory.turbomind.account import Account, Outcome
from turbofit.memory.turbomind.constants import load_constants
from turbofit.model.images import unit_tokens, units, worst_units
from turbofit.tuner.predict import default_batch_size

__all__ = ["Forecast", "forecast"]

_RATIO = 0.8
_PREFILL = 8192


class Forecast(Struct):
    """What the account says of a row: ledgers of its GPUs and the cache in blocks.

    ``first_image`` are bytes of ``steady`` that only a request brings.
    """

    generation: str
    ledgers: tuple[GpuLedger, ...]
    free: int
    region: int
    block_bytes: int
    block_tokens: int
    starved: bool
    first_image: int = 0

    @property
    def outcome(self) -> str:
        """``ok``, ``oom`` (it never serves), or ``oom_on_request`` (a worst case kills it)."""
        usable = [one.total - one.reserved for one in self.ledgers]
        starts = all(
            max(one.steady - self.first_image, one.load_peak) <= room
            for one, room in zip(self.ledgers, usable, strict=True)
        )
        if self.free <= 0 or self.starved or not starts:
            return "oom"
        lives = all(one.peak <= room for one, room in zip(self.ledgers, usable, strict=True))
        return "ok" if lives else "oom_on_request"

    @property
    def phase(self) -> str:
        """The first phase that does not fit; "" where all do."""
        for one in self.ledgers:
            if one.load_peak > one.total - one.reserved:
                return "load"
        if self.outcome == "oom":
            return "start"
        return "request" if self.outcome == "oom_on_request" else ""

    @property
    def spare(self) -> int:
        """Bytes that the tightest GPU keeps."""
        return min(one.headroom for one in self.ledgers)

    @property
    def has_margin(self) -> bool:
        """Whether more than the default margin is kept."""
        return all(one.headroom > one.margin for one in self.ledgers)


def forecast(inputs: Inputs) -> Forecast:
    """The forecast of a row.

    Raises:
        MissingError: no account for its engine or model.
    """
    return _ENGINES[inputs.row.engine](inputs)


def _turbomind(inputs: Inputs) -> Forecast:
    """TurboMind of any generation."""
    gpus = _gpus(inputs)
    constants, margins = load_constants(), [_margin(gpu) for gpu in gpus]
    exposure, free = _exposure(inputs), _free(inputs)
    if not is_legacy(inputs.version):
        settings = _settings(inputs, default_batch_size(gpus[0].name), _RATIO, _PREFILL, 64, 0)
        account = Account(
            inputs.model, settings, gpus, inputs.machine, exposure, constants, margins, free
        )
        ratio = settings.cache_max_entry_count
        return _forecast("0.18", account.at(ratio), account.shape.block_bytes, 64, False)
    rules = generation_of(inputs.version)
    batch = rules.batch_size(gpus[0].name)
    settings = _settings(
        inputs,
        batch,
        rules.cache.default,
        rules.prefill,
        rules.cache.block_tokens,
        rules.session_extra,
    )
    older = legacy_account(
        inputs.model, settings, gpus, inputs.machine, exposure, constants, margins, rules, free
    )
    ratio = settings.cache_max_entry_count
    if isinstance(older, Account):
        shape = older.shape
        return _forecast(rules.first, older.at(ratio), shape.block_bytes, 64, older.hangs_at(ratio))
    return _grouped(rules.first, older, ratio)


def _pytorch(inputs: Inputs) -> Forecast:
    """The PyTorch engine before 0.18; 0.18's own account belongs here too."""
    if not is_legacy(inputs.version):
        raise MissingError(f"an account of the PyTorch engine of {inputs.version}")
    rules = torch_generation_of(inputs.version)
    gpus = _gpus(inputs)
    settings = _settings(
        inputs,
        rules.batch_size(gpus[0].name),
        _RATIO,
        rules.prefill,
        rules.block_tokens,
        0,
    )
    account = LegacyTorchAccount(
        inputs.model,
        settings,
        gpus,
        inputs.machine,
        _exposure(inputs),
        load_constants(),
        [_margin(gpu) for gpu in gpus],
        rules,
        _free(inputs),
    )
    return _grouped(rules.first, account, settings.cache_max_entry_count)


def _grouped(generation: str, account: GroupAccount, ratio: float) -> Forecast:
    """From an older engine's account."""
    outcome = account.at(ratio)
    warmup = next(t.bytes for t in outcome.ledgers[0].ledger if t.term == "pool_warmup")
    return Forecast(
        generation=generation,
        ledgers=outcome.ledgers,
        free=outcome.free,
        region=outcome.region,
        block_bytes=account.block_bytes,
        block_tokens=account.block_tokens,
        starved=account.starved_at(ratio),
        first_image=max(0, warmup - account.own_warmup),
    )


_ENGINES: dict[str, Callable[[Inputs], Forecast]] = {
    "turbomind": _turbomind,
    "pytorch": _pytorch,
}


def _forecast(
    generation: str, outcome: Outcome, block: int, tokens: int, starved: bool
) -> Forecast:
    return Forecast(
        generation=generation,
        ledgers=outcome.ledgers,
        free=outcome.free,
        region=outcome.region,
        block_bytes=block,
        block_tokens=tokens,
        starved=starved,
    )


def _gpus(inputs: Inputs) -> Sequence[Gpu]:
    return [inputs.machine.gpu(index) for index in inputs.machine.visible[: inputs.row.tp]]


def _free(inputs: Inputs) -> int | None:
    """Bytes that were free when the cache was sized, where a log said so."""
    free = inputs.row.free_mib
    return None if free is None else int(free * MIB)


def _margin(gpu: Gpu) -> int:
    total = gpu.total if isinstance(gpu.total, int) else 0
    return max(256 * MIB, total // 100)


def _settings(
    inputs: Inputs, batch: int, ratio: float, prefill: int, block: int, extra: int
) -> Settings:
    """The row's settings over the generation's defaults."""
    given, model = inputs.row.settings, inputs.model
    session = int(given.get("session_len", model.text.max_position_embeddings + extra))
    context = int(given.get("max_context_token_num", 0))
    if prefill == 0:  # older than max_prefill_token_num; few of them count sessions
        prefill = context if context >= session else context * session
    return Settings(
        tp=inputs.row.tp,
        cache_max_entry_count=given.get("cache_max_entry_count", ratio),
        max_batch_size=int(given.get("max_batch_size", batch)),
        max_prefill_token_num=int(given.get("max_prefill_token_num", prefill)),
        session_len=session,
        quant_policy=inputs.quant_policy,
        cache_block_seq_len=block,
    )


def _exposure(inputs: Inputs) -> Exposure:
    """Images as the row asked for them, else one at the checkpoint's own limit."""
    model: Model = inputs.model
    if model.image_rule is None or model.vision is None:
        return NO_IMAGES
    rule, row = model.image_rule, inputs.row
    if row.size is not None:
        found = units(rule, *row.size, max_dynamic_patch=row.tiles)
    else:
        found = worst_units(rule, max_dynamic_patch=row.tiles)
    images = row.images or 1
    return Exposure(
        units_per_image=found,
        images_per_request=images,
        tokens_per_request=unit_tokens(rule, found) * images,
    )
