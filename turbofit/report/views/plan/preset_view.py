"""What the presets know, as documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import MIB, format_bytes
from turbofit.report.painters.document import Column, Heading, Items, Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.model import Model
    from turbofit.machine.presets import GpuPreset
    from turbofit.report.painters.document import Block

__all__ = ["gpus_view", "models_view"]


def models_view(
    known: Iterable[tuple[str, Model]],
    unsupported: Iterable[tuple[str, str]],
    *,
    hub_ids: bool = True,
) -> list[Block]:
    """Models by name; those without an account below, with the reason.

    Args:
        known: models by their names.
        unsupported: reasons by their models' names.
        hub_ids: false where the terminal has no room for them.
    """
    columns = (
        Column(title="name"),
        Column(title="params", right=True),
        Column(title="weights", right=True),
        Column(title="context", right=True),
        Column(title="images"),
        Column(title="hub id", aside=not hub_ids),
    )
    rows = tuple(
        (
            name,
            f"{model.parameters / 1e9:.2f}B",
            format_bytes(model.weight_bytes),
            f"{model.text.max_position_embeddings:,}",
            "none" if model.image_rule is None else model.image_rule.summary,
            model.hub_id or "",
        )
        for name, model in known
    )
    blocks: list[Block] = [Heading(text="Models"), Table(columns=columns, rows=rows)]
    without = tuple(f"{name}: {why}" for name, why in unsupported)
    if without:
        blocks += [Heading(text="Not planned for"), Items(items=without)]
    return blocks


def gpus_view(known: Iterable[tuple[str, GpuPreset]]) -> list[Block]:
    """GPUs by name."""
    columns = (
        Column(title="name"),
        Column(title="as NVML names it", wrap=True),
        Column(title="cc", right=True),
        Column(title="MiB", right=True),
        Column(title="reserved", right=True),
        Column(title="GB/s", right=True),
        Column(title="TFLOP/s", right=True),
        Column(title="P2P"),
    )
    rows = tuple(
        (
            name,
            preset.name,
            "{}.{}".format(*preset.compute_capability.value),
            f"{preset.total // MIB:,}",
            f"{preset.reserved // MIB:,}",
            f"{preset.memory_bandwidth.value / 1e9:,.0f}",
            f"{preset.dense_flops.value / 1e12:,.0f}",
            preset.p2p.value,
        )
        for name, preset in known
    )
    return [Heading(text="GPUs"), Table(columns=columns, rows=rows)]
