"""What to rehearse: the pretend machine, the model folder, the settings and the cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.json_types import Document
from turbofit.pretend.documents import from_builtins
from turbofit.pretend.scenario import Scenario

__all__ = ["RehearsalCase", "RehearsalRequest", "Spec", "Unit", "load_spec", "parse_spec"]

Unit = int | tuple[int, int, int]


@dataclass(frozen=True)
class RehearsalRequest:
    """One request.

    Attributes:
        text_tokens: prompt tokens that are not an image's.
        units: one entry an image: tiles (InternVL), or the grid t, h, w in patches (Qwen2-VL).
        max_new_tokens: tokens to generate.
        top_k: sampling; 0 samples over the whole vocabulary.
        output_logits: None, "all" or "generation".
        lead: of ``text_tokens`` those before the images; None is half of them.
        images: requests of one number have the same images (a prefix cache finds them again);
            None: like no other's.
    """

    text_tokens: int = 20
    units: tuple[Unit, ...] = ()
    max_new_tokens: int = 4
    top_k: int = 1
    output_logits: str | None = None
    lead: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class RehearsalCase:
    """Requests that are queued whole before the engine's first step."""

    name: str
    requests: tuple[RehearsalRequest, ...]


@dataclass(frozen=True)
class Spec:
    """A rehearsal.

    Attributes:
        machine: the pretend machine.
        model_dir: a checkpoint folder; of its safetensors files only the headers are read.
        settings: fields of LMDeploy's TurbomindEngineConfig.
        cases: run in this order, each after the last has come to rest.
        staging: charge the first card with what loading stages through torch.
        start_seconds, case_seconds: how long the engine may do nothing before it counts as a hang.
    """

    machine: Scenario
    model_dir: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[RehearsalCase, ...] = ()
    staging: bool = True
    start_seconds: float = 300.0
    case_seconds: float = 120.0


def parse_spec(data: Document) -> Spec:
    """The Spec of a parsed JSON document.

    Raises:
        UsageError: it is none.
    """
    try:
        return from_builtins(data, Spec)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"the rehearsal's specification is not valid: {error}",
            hint="it needs machine, model_dir, settings and cases; "
            "see turbofit/rehearse/turbomind/spec.py",
        ) from error


def load_spec(path: Path) -> Spec:
    """Reads a Spec from a JSON file.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="give a JSON file with a rehearsal's specification"
        ) from error
    return parse_spec(data)
