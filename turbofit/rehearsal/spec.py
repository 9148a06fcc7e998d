"""The specification of a rehearsal: engine, pretend machine, model, settings and cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from turbofit.rehearsal.pretend.scenario import Scenario

Unit = int | tuple[int, int, int]
#: A value of ``text_tokens``: the prompt is as long as the engine allows.
LONGEST: Final = -1
#: An ordinary token of each vocabulary, and a letter that is one token for a twin's tokenizer.
TOKEN: Final = 5
LETTER: Final = "a"
#: The setting that is no field of the engine configuration: LMDeploy's configuration of a draft.
SPECULATIVE_CONFIG: Final = "speculative_config"


@dataclass(frozen=True)
class RehearsalRequest:
    """One request.

    Attributes:
        text_tokens: prompt tokens that are not an image's (with ``sizes``: letters, each of which
          is a token of a twin's tokenizer); ``LONGEST`` for as many as the engine takes.
        units: for TurboMind, the units of each image: tiles, or the grid t, h, w in patches.
        sizes: for an engine on torch, (width, height) of each image in pixels.
        top_k: 0 samples over the whole vocabulary.
        lead: how many of ``text_tokens`` come before the images; None means half of them. Only
          TurboMind uses it.
        images: with ``sizes``, a number that sets the pictures' colour, so that a prefix cache
          does not take them for those of another request.
    """

    text_tokens: int = 20
    units: tuple[Unit, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    max_new_tokens: int = 4
    top_k: int = 1
    lead: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class RehearsalCase:
    """Requests that are all in the queue before the engine's next step."""

    name: str
    requests: tuple[RehearsalRequest, ...]


@dataclass(frozen=True)
class Spec:
    """The specification of a rehearsal.

    Attributes:
        machine: the pretend machine, with the bytes that are charged to it beforehand.
        engine: a key of `turbofit.rehearsal.engines.REHEARSED_ENGINES`.
        settings: fields of LMDeploy's engine configuration; for Transformers ``dtype`` and
          ``device_map``. With a draft, also ``SPECULATIVE_CONFIG``.
        cases: run in this order, each after the requests of the previous case have ended.
        start_seconds, case_seconds: how long the engine may make no progress, at its start and in
          a case, before it counts as hanging.
    """

    machine: Scenario
    model_dir: str
    engine: str = "turbomind"
    settings: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[RehearsalCase, ...] = ()
    start_seconds: float = 300.0
    case_seconds: float = 120.0
    environ: Mapping[str, str] = field(default_factory=dict)
