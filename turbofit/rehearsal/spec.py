"""The specification of a rehearsal: engine, pretend machine, model, settings and cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from turbofit.rehearsal.pretend.scenario import Scenario

Unit = int | tuple[int, int, int]
#: The value of ``text_tokens`` for a prompt that is as long as the engine allows.
LONGEST: Final = -1
#: A token that every vocabulary has.
TOKEN: Final = 5
#: A letter that is one token of a twin's tokenizer.
LETTER: Final = "a"
#: The setting with LMDeploy's configuration of a draft; the engine configuration has no such field.
SPECULATIVE_CONFIG: Final = "speculative_config"


@dataclass(frozen=True)
class RehearsalRequest:
    """One request.

    Attributes:
        text_tokens: the number of prompt tokens without the images' tokens; ``LONGEST`` for as many
          as the engine takes. With ``sizes`` it is a number of letters: each is one token.
        units: for TurboMind, the vision units of each image: tiles, or a grid (frames, height,
          width) in patches.
        sizes: for an engine on torch, (width, height) of each image in pixels.
        top_k: 0 samples over the whole vocabulary.
        lead: for TurboMind, how many of the ``text_tokens`` come before the images; None: half.
        images: with ``sizes``, a number that sets the colour of the pictures. Pictures of another
          colour are new for a prefix cache.
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
        machine: the pretend machine; memory that only a real card would take is in use on it.
        engine: a key of `turbofit.rehearsal.engines.REHEARSED_ENGINES`.
        settings: fields of LMDeploy's engine configuration, or ``dtype`` and ``device_map`` of
          Transformers. With a draft, also ``SPECULATIVE_CONFIG``.
        cases: the cases in their order; a case begins when the requests of the case before have
          ended.
        start_seconds, case_seconds: an engine hangs if it makes no progress for this many seconds,
          at its start or in a case.
    """

    machine: Scenario
    model_dir: str
    engine: str = "turbomind"
    settings: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[RehearsalCase, ...] = ()
    start_seconds: float = 300.0
    case_seconds: float = 120.0
    environ: Mapping[str, str] = field(default_factory=dict)
