"""What a rehearsal of an engine that runs on torch drives: model folder, settings, cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["LONGEST", "TorchCase", "TorchRequest", "TorchSpec"]

#: ``text_tokens`` of a prompt as long as the engine takes one.
LONGEST: Final = -1


@dataclass(frozen=True)
class TorchRequest:
    """One request.

    Attributes:
        text_tokens: prompt tokens beside the images' (with images: letters, which a twin's
            tokenizer takes for a token each); ``LONGEST`` for as many as the engine takes.
        images: (width, height) of each image, pixels.
        max_new_tokens: tokens to generate.
        top_k: sampling; 0 samples over the whole vocabulary.
        shade: pictures of one size and one shade are the same picture to a prefix cache.
    """

    text_tokens: int = 20
    images: tuple[tuple[int, int], ...] = ()
    max_new_tokens: int = 4
    top_k: int = 1
    shade: int = 0


@dataclass(frozen=True)
class TorchCase:
    """Requests that are all submitted before the engine's next step."""

    name: str
    requests: tuple[TorchRequest, ...]


@dataclass(frozen=True)
class TorchSpec:
    """A rehearsal's child: which engine, with what, doing what.

    Attributes:
        engine: ``pytorch`` (LMDeploy's) or ``transformers``.
        model_dir: a checkpoint folder.
        settings: fields of LMDeploy's PytorchEngineConfig; for Transformers ``dtype`` and
            ``device_map``.
        cases: run in this order, each after the last has ended.
        case_seconds: how long a case may take before it counts as a hang.
        environ: variables that the engine is started with, before those of the rehearsal.
        speculative: fields of LMDeploy's SpeculativeConfig; empty where nothing drafts.
    """

    engine: str
    model_dir: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[TorchCase, ...] = ()
    case_seconds: float = 120.0
    environ: Mapping[str, str] = field(default_factory=dict)
    speculative: Mapping[str, Any] = field(default_factory=dict)
