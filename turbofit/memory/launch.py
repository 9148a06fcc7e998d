"""What an account is made for: one engine with its settings on a group of GPUs."""

from __future__ import annotations

from turbofit.core.machine import Calibration, Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.memory.vision_load import VisionLoad

__all__ = ["EngineLaunch"]


class EngineLaunch(Struct):
    """One engine on one group of GPUs, before it is launched.

    ``gpus`` are the group's, the first one first; ``machine`` tells of the links between them.
    ``vision_load`` is what clients can ask of the vision tower. ``margins`` are bytes to leave
    free, one for each GPU, and ``saved`` what of each a calibration makes superfluous.
    ``free_at_cache`` are the bytes that are free when the cache is sized, as a log said: they
    replace all that is taken before it.
    """

    model: Model
    settings: Settings
    gpus: tuple[Gpu, ...]
    machine: Machine
    vision_load: VisionLoad
    margins: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    free_at_cache: int | None = None

    def margins_with(self, calibration: Calibration | None) -> tuple[int, ...]:
        """Bytes to leave free where contexts and libraries were measured, or were not."""
        if calibration is None or not self.saved:
            return self.margins
        pairs = zip(self.margins, self.saved, strict=True)
        return tuple(margin - max(0, saved - calibration.spread) for margin, saved in pairs)
