"""Accounts of older engines on empty A100-80G cards."""

from __future__ import annotations

from turbofit.core.plan import Settings
from turbofit.machine.spec import parse_spec
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.legacy.generations import generation_of
from turbofit.memory.legacy.legacy_account import LegacyAccount, legacy_account
from turbofit.memory.turbomind.constants import load_constants
from turbofit.memory.vision_load import NO_IMAGES, VisionLoad
from turbofit.model.source import resolve_model


def vision_load_of(model, images=1):
    if model.image_rule is None:
        return NO_IMAGES
    units = model.image_rule.worst_units()
    return VisionLoad(
        units_per_image=units,
        images_per_request=images,
        tokens_per_request=model.image_rule.unit_tokens(units) * images,
    )


def account(
    name: str,
    version: str,
    *,
    tp: int = 1,
    on: str = "a100-80g",
    free: int | None = None,
    **settings: object,
) -> LegacyAccount:
    model, rules = resolve_model(name), generation_of(version)
    machine = parse_spec(f"{tp}x{on}")
    gpus = [machine.gpu(i) for i in machine.visible]
    base = {
        "tp": tp,
        "max_batch_size": rules.batch_size(gpus[0].name),
        "max_prefill_token_num": rules.prefill,
        "session_len": model.text.max_position_embeddings,
        "cache_block_seq_len": rules.cache.block_tokens,
    }
    launch = EngineLaunch(
        model=model,
        settings=Settings(**{**base, **settings}),
        gpus=tuple(gpus),
        machine=machine,
        vision_load=vision_load_of(model),
        margins=(0,) * tp,
        free_at_cache=free,
    )
    made = legacy_account(launch, load_constants(), rules)
    assert isinstance(made, LegacyAccount)
    return made


def terms(made: LegacyAccount, ratio: float, gpu: int = 0) -> dict[str, int]:
    return {t.term: t.bytes for t in made.at(ratio).ledgers[gpu].ledger}
