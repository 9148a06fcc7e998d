"""What the sweep of allocations has: its configurations, allocations, and ends of lives."""

from __future__ import annotations

from dataclasses import dataclass, field

from turbofit.core.units import MIB
from turbofit.pretend.scenario import PretendGpu

__all__ = ["CONFIGS", "Config", "Ended", "Point"]

_RTX3090 = PretendGpu("NVIDIA GeForce RTX 3090", total=24268 * MIB, used=400 * MIB)
_RTX3060 = PretendGpu("NVIDIA GeForce RTX 3060", total=11911 * MIB, used=400 * MIB, sm_count=28)


@dataclass(frozen=True)
class Config:
    """One configuration of the sweep.

    Attributes:
        name: for people.
        model: a preset.
        engine: ``turbomind``, ``pytorch`` or ``transformers``.
        gpus: the machine, one card a rank.
        beside: another engine of this kind serves on the same card.
        lives: how many allocations fail, one a life, device and page-locked together.
    """

    name: str
    model: str
    engine: str = "turbomind"
    gpus: tuple[PretendGpu, ...] = (_RTX3090,)
    beside: bool = False
    lives: int = 12

    @property
    def on(self) -> str:
        """The machine for ``turbofit diagnose --on``."""
        names = [gpu.name.rpartition(" ")[2] for gpu in self.gpus]
        counted = dict.fromkeys(names)
        return "+".join(f"{names.count(name)}xrtx{name}:used={400}MiB" for name in counted)


CONFIGS = (
    Config("TurboMind, 16 bit, tp 1", "internvl2-1b", lives=24),
    Config("TurboMind, 16 bit, tp 2", "internvl2-2b", gpus=(_RTX3090,) * 2),
    Config("TurboMind, 16 bit, tp 4", "internvl2-2b", gpus=(_RTX3090,) * 4),
    Config("TurboMind, AWQ, tp 1", "internvl2-8b-awq"),
    Config("TurboMind, AWQ, tp 2", "internvl2-8b-awq", gpus=(_RTX3090,) * 2, lives=8),
    Config("TurboMind, AWQ, tp 4", "internvl2-8b-awq", gpus=(_RTX3090,) * 4, lives=6),
    Config("TurboMind, unequal cards, tp 2", "qwen2-vl-2b", gpus=(_RTX3090, _RTX3060)),
    Config("TurboMind, two models on one card", "internvl2-1b", beside=True),
    Config("LMDeploy's PyTorch engine", "qwen2-vl-2b", engine="pytorch", lives=6),
    Config("Transformers", "qwen2-vl-2b", engine="transformers", lives=8),
)


@dataclass(frozen=True)
class Point:
    """An allocation of a life: its number, phase of its card, and the engine's call.

    ``executor``: it came from the pool in which forwards are computed.
    """

    number: int
    pinned: bool
    phase: str
    site: str
    executor: bool = False


@dataclass
class Ended:
    """How a life ended whose allocation failed.

    Attributes:
        kind: ``named`` (died, and turbofit names phase and cause), ``recovered`` (served all the
            same), ``answered`` (the request got an error and the engine lives), ``hang``,
            ``misnamed`` (turbofit says something else), ``not met`` (there was no such allocation).
        point: which one, by this life's own account.
        said: what turbofit said.
        why: where it is misnamed, what is wrong.
    """

    kind: str
    point: Point | None
    seconds: float
    said: str = ""
    why: str = ""
    log: bytes = field(default=b"", repr=False)
