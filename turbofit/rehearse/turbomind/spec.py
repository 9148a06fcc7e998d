"""What to rehearse: the pretend machine, the model folder, the settings and the cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbofit.core.errors import UsageError

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
        machine: as ``turbofit.pretend.scenario.scenario_from_spec`` reads it.
        model_dir: a checkpoint folder; of its safetensors files only the headers are read.
        settings: fields of LMDeploy's TurbomindEngineConfig.
        cases: run in this order, each after the last has come to rest.
        staging: charge the first card with what loading stages through torch.
        start_seconds, case_seconds: how long to wait before it counts as a hang.
        raw: the JSON document.
    """

    machine: Mapping[str, Any]
    model_dir: Path
    settings: Mapping[str, Any]
    cases: tuple[RehearsalCase, ...] = ()
    staging: bool = True
    start_seconds: float = 300.0
    case_seconds: float = 120.0
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)


def _request(data: Mapping[str, Any]) -> RehearsalRequest:
    units = tuple(u if isinstance(u, int) else (u[0], u[1], u[2]) for u in data.get("units", ()))
    return RehearsalRequest(
        text_tokens=int(data.get("text_tokens", 20)),
        units=units,
        max_new_tokens=int(data.get("max_new_tokens", 4)),
        top_k=int(data.get("top_k", 1)),
        output_logits=data.get("output_logits"),
        lead=data.get("lead"),
        images=data.get("images"),
    )


def parse_spec(data: Mapping[str, Any]) -> Spec:
    """The Spec of a parsed JSON document."""
    try:
        cases = tuple(
            RehearsalCase(str(c["name"]), tuple(_request(r) for r in c["requests"]))
            for c in data.get("cases", ())
        )
        return Spec(
            machine=data["machine"],
            model_dir=Path(data["model_dir"]),
            settings=dict(data.get("settings", {})),
            cases=cases,
            staging=bool(data.get("staging", True)),
            start_seconds=float(data.get("start_seconds", 300.0)),
            case_seconds=float(data.get("case_seconds", 120.0)),
            raw=data,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"the rehearsal's specification is not valid: {type(error).__name__} {error}",
            hint="it needs machine, model_dir, settings and cases; "
            "see turbofit/rehearse/turbomind/spec.py",
        ) from error


def load_spec(path: Path) -> Spec:
    """Reads a Spec from a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="give a JSON file with a rehearsal's specification"
        ) from error
    return parse_spec(data)
