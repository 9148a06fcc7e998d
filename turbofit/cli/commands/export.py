"""``turbofit export``: a plan as a systemd unit, for Compose, Kubernetes or GPUStack."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Final

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options import common_options as common
from turbofit.cli.terminal.output import answer
from turbofit.core.errors import UsageError, option_of
from turbofit.core.messages import counted
from turbofit.core.plan import Plan
from turbofit.core.presets import presets_dir
from turbofit.core.process.network import DEFAULT_PORT
from turbofit.core.struct import Options, known
from turbofit.core.units import GIB, round_up
from turbofit.core.version import __version__

#: Bytes of /dev/shm for NCCL between cards without peer access. Source: NCCL's guide, Docker.
_NCCL_SHM: Final = 1 << 30
#: The share of host memory that LMDeploy gives Ray's object store.
#: Source: lmdeploy pytorch/ray.py::_get_obj_store_memory #e802ab
_RAY_SHARE: Final = 0.3
#: The most bytes that LMDeploy gives Ray's object store. Source: the same function.
_RAY_MOST: Final = 80 * 10**9
_NAME: Final = re.compile(r"[^a-z0-9]+")
#: A word that systemd reads without quotes.
_PLAIN: Final = re.compile(r"[\w@%+=:,./$-]+", re.ASCII)
_IMAGE: Final = "turbofit:latest"


class _Template(Template):
    """A template with fields like ``@{field}``, since Compose and systemd use ``$`` themselves."""

    delimiter = "@"


def manifest(
    plan: Plan, kind: str, *, port: int, name: str | None = None, image: str = "turbofit:latest"
) -> str:
    """Return the manifest of a plan; ``kind`` is systemd, compose, k8s or gpustack.

    The text is presets/export/KIND.template with its fields filled. ``name`` is the service's name,
    by default ``turbofit-`` and the model's name. Containers run ``image``.

    Raises:
        DoesNotFitError: the plan would not serve.
        UsageError: the name does not begin with a letter.
    """
    if plan.serve is None:
        from turbofit.planning.plan import refusal

        raise refusal(plan)
    label = _NAME.sub("-", (name or f"turbofit-{plan.model.name}").lower()).strip("-")[:53]
    if not label[:1].isalpha():  # a Kubernetes Service needs a letter first
        raise UsageError(f"--name {name} does not begin with a letter", hint="give a name like vlm")
    indices = [index for group in plan.groups for index in group]
    cards = dict.fromkeys(" ".join(plan.machine.gpu(index).name.split()) for index in indices)
    shown_cards = f"{counted(len(indices), 'GPU')}: {', '.join(cards)}"
    values: dict[str, object] = {
        "name": label.strip("-"), "image": image, "quoted_image": _quoted(image), "port": port,
        "gpus": len(indices), "memory": _mebibytes(plan.host.total), "shm": _mebibytes(_shm(plan)),
        "vram": _claim(plan), "shm_gib": round_up(_shm(plan), GIB) // GIB,
        "version": __version__,
        "cards": shown_cards,
        "model": " ".join(plan.model.name.split()).rstrip("\\").replace("%", "%%"),
        "command": _command(plan.serve.argv, kind, port),
    }  # fmt: skip
    text = (presets_dir() / "export" / f"{kind}.template").read_text(encoding="utf-8")
    return _Template(text).substitute(values)


def _command(argv: Iterable[str], kind: str, port: int) -> str:
    """Write the plan's command in the form that this kind of manifest needs."""
    words, listening = [*argv], ["--port", str(port)]
    if kind == "systemd":
        words = [installed_program(), *words[1:], *listening]
        return " ".join(_word(word).replace("$", "$$") for word in words)
    if "--gpus" in words:  # a container sees only its own cards
        place = words.index("--gpus")
        del words[place : place + 2]
    if kind == "gpustack":
        return _gpustack_command(words)
    # Outside the container's network nobody reaches this address.
    words += [*listening, "--host", "0.0.0.0"]
    if kind == "compose":
        return "".join(f"    - {_quoted(word.replace('$', '$$'))}\n" for word in words)
    # Kubernetes would replace $(NAME) by a variable's value.
    return "".join(f"        - {_quoted(word.replace('$(', '$$('))}\n" for word in words)


def _gpustack_command(words: list[str]) -> str:
    """Write what follows the entry point; GPUStack knows the folder, the name and the address.

    It splits the line as a shell would after it filled these in. Containers share the worker's
    network. Source: gpustack/schemas/inference_backend.py (``replace_command_param``).
    """
    listening = ["--host", "{{worker_ip}}", "--port", "{{port}}"]
    command = ["serve", "{{model_path}}", *words[3:], *listening]
    return _quoted(shlex.join([*command, "--model-name", "{{model_name}}", "--no-auth"]))


def _claim(plan: Plan) -> int:
    """Return the bytes that the engines need of all their GPUs, margins included."""
    return sum(gpu.most - gpu.used + gpu.margin for gpu in plan.ledgers)


def _shm(plan: Plan) -> int:
    """Return the bytes of /dev/shm that an engine's ranks and Ray's object store need."""
    if plan.tp == 1 or not plan.backend.is_pytorch:
        return _NCCL_SHM
    total = known(plan.machine.host.ram_total, 0)
    return _NCCL_SHM + (min(_RAY_MOST, int(total * _RAY_SHARE)) if total else _RAY_MOST)


def _mebibytes(size: int) -> int:
    return -(-size >> 20)


def _quoted(word: str) -> str:
    """Quote a word for YAML and systemd: as JSON does, with escapes of unprintable characters."""
    return "".join(
        c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(word, ensure_ascii=False)
    )


def _word(text: str) -> str:
    """Write a word for systemd, in quotes if it needs them."""
    text = text.replace("%", "%%")
    return text if _PLAIN.fullmatch(text) else _quoted(text)


def installed_program() -> str:
    """Return the path of the `turbofit` program that runs here."""
    beside = Path(sys.executable).with_name("turbofit")
    return str(beside) if beside.exists() else shutil.which("turbofit") or "/usr/bin/turbofit"


@command(
    Argument("kind", metavar="KIND", type=click.Choice(("systemd", "compose", "k8s", "gpustack"))),
    Argument("plan", metavar="PLAN", type=PATH),
    *common.machine_options(),
    Option("--name"),
    Option("--port", type=common.PORT, default=DEFAULT_PORT, usual=f" (default {DEFAULT_PORT})"),
    Option("--image", default=_IMAGE, usual=f" (default {_IMAGE})"),
    *common.planning_options(),
)
def export(
    *, kind: str, plan: str, name: str | None, port: int, image: str, **given: object
) -> int:

    planned = _plan_from(plan, common.planning_keywords(given))
    answer(manifest(planned, kind, port=port, name=name, image=image))
    return 0


def _plan_from(given: str, options: Options) -> Plan:
    """Read the plan from a file of `plan --json`, or make a plan for a model with these options."""
    from turbofit import api
    from turbofit.model.source import refuse_missing_folder
    from turbofit.report.stored_documents import read_plan

    if given == "-" or given.endswith(".json") or os.path.isfile(given):
        if options:
            names = ", ".join(map(option_of, options))
            raise UsageError(
                f"{given} is a plan already", hint=f"leave {names} out, or name a model"
            )
        return read_plan(given)
    refuse_missing_folder(given)
    return api.plan(given, **options)
