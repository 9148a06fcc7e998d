"""Manifests of a plan: `turbofit serve` under systemd, Docker Compose and Kubernetes."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePath
from string import Template
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET

from turbofit.core.errors import DoesNotFitError, UsageError
from turbofit.core.messages import plural
from turbofit.core.presets import presets_dir
from turbofit.core.struct import Struct, known
from turbofit.launch.engine.engine_client import Timing
from turbofit.planning.commands import is_prediction, request_of, with_limits
from turbofit.planning.request import PlanRequest
from turbofit.planning.tuned import pinned

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.plan import Plan

#: Seconds after the drain in which engines end and their memory comes back.
_AFTER_DRAIN: Final = 30
#: Bytes of /dev/shm for NCCL between cards without peer access. Source: NCCL's guide, Docker.
_NCCL_SHM: Final = 1 << 30
#: LMDeploy gives Ray's object store this share of host RAM, but at most so many bytes.
#: Source: lmdeploy pytorch/ray.py::_get_obj_store_memory #e802ab
_RAY_SHARE: Final = 0.3
_RAY_MOST: Final = 80 * 10**9
#: The next start surely holds a context if this plan's cache holds this many times as much.
_SPARE: Final = 1.25
_NAME: Final = re.compile(r"[^a-z0-9]+")
#: The user of a unit that root exports: the unit does not use root's caches.
SYSTEM_USER: Final = "turbofit"
#: A word that systemd reads without quotes, and the escapes of characters within quotes.
_PLAIN: Final = re.compile(r"[\w@%+=:,./$-]+", re.ASCII)
_ESCAPED: Final = {"\\": "\\\\", '"': '\\"'}


class Service(Struct):
    """A plan as a service, which is started again and again.

    ``memory``: bytes of host memory that the engines take; ``shm``: bytes that ``/dev/shm`` must
    hold, 0 if nothing needs it. ``uuids`` are empty if the plan was made for a preset.
    ``hub_cache`` is the hub's cache that holds the checkpoint; ``folder`` is the checkpoint if the
    command names its path. ``start``: seconds until it must answer; ``stop``: seconds until it must
    have ended.
    """

    name: str
    argv: tuple[str, ...]
    gpus: int
    uuids: tuple[str, ...]
    card: str
    memory: int
    shm: int
    port: int
    hub_cache: str | None = None
    folder: str | None = None
    start: int = int(Timing().start)
    stop: int = int(Timing().drain) + _AFTER_DRAIN


def service_of(plan: Plan, *, port: int, host: str, name: str | None = None) -> Service:
    """Return the service of a plan, by default named after the model.

    The command plans again at every start, with the plan's shape and options, because free memory
    and the GPUs themselves (of the same kind) may have changed by then.

    Raises:
        DoesNotFitError: the plan would not serve.
        UsageError: the name does not begin with a letter, or the plan does not say with which
            options it was made.
    """
    if not plan.fits:
        raise DoesNotFitError(
            f"this plan does not serve: {plan.verdict}",
            hint="export a plan that fits; turbofit report shows what would",
        )
    label = _NAME.sub("-", (name or f"turbofit-{plan.model.name}").lower()).strip("-")[:53]
    if not label[:1].isalpha():  # the name of a Kubernetes Service must
        raise UsageError(f"--name {name} does not begin with a letter", hint="give a name like vlm")
    groups = plan.parallel.groups
    indices = [index for group in groups for index in group]
    cards = [plan.machine.gpu(index) for index in indices]
    measured = plan.machine.source != "preset"
    request, cache = _request(plan), _hub_cache(plan)
    model, words = str(request.model), request.option_arguments(("model",))
    return Service(
        name=label.strip("-"),
        argv=("turbofit", "serve", model, *words, "--host", host, "--port", str(port)),
        gpus=len(indices),
        uuids=tuple(gpu.uuid for gpu in cards) if measured else (),
        card=", ".join(dict.fromkeys(" ".join(gpu.name.split()) for gpu in cards)),
        memory=plan.host.total,
        shm=_shm(plan),
        port=port,
        hub_cache=None if cache is None else str(cache),
        folder=model if os.path.isabs(model) else None,
    )


def _request(plan: Plan) -> PlanRequest:
    """The request of this plan, with the plan's engine, shape and promises as options."""
    if plan.options is UNSET:
        raise UsageError(
            "this plan does not say with which options it was made",
            hint="plan again with this version of turbofit, then export",
        )
    model = plan.model
    source = model.source.checkpoint
    if source is None or _hub_cache(plan) is not None:
        source = model.hub_id or model.name
    request = with_limits(pinned(request_of(plan, source), plan), plan)
    more: dict[str, Any] = {"engine": plan.engine.name, "revision": model.revision}
    if not plan.by_group:  # unequal cards: --tp and --replicas do not say which form a group
        # Transformers' settings have no tp: there it is the number of GPUs of one copy.
        more["tp"] = max(plan.settings.tp, *map(len, plan.parallel.groups))
        more["replicas"] = plan.parallel.replicas
    if not request.given().keys() & {"context", "session_len"}:
        more["context"] = _promised_context(plan)
    rule, limit = model.image_rule, plan.limits.image_limit
    # A forecast's limit is the largest that clients may request from a server without limits.
    said = request.given().keys() & {"image_size", "max_pixels", "max_dynamic_patch"}
    if rule and limit and limit != rule.checkpoint_limit and not is_prediction(plan) and not said:
        more[rule.limit_name] = limit
    return request.changed(**more)


def _hub_cache(plan: Plan) -> PurePath | None:
    """The hub's cache if the checkpoint is a snapshot in it, whose links need the cache's files."""
    source = plan.model.source
    if source.kind != "hub_cache" or source.checkpoint is None:
        return None
    snapshot = PurePath(source.checkpoint)
    return snapshot.parents[2] if snapshot.parent.name == "snapshots" else None


def _promised_context(plan: Plan) -> int | None:
    """The context to promise at the next start; None lets that start choose it.

    A context that was lowered to what the cache holds is left to the next start, whose cache may be
    a page smaller.
    """
    context = plan.settings.session_len
    if plan.footprint is not UNSET:  # the cache is made for it
        return context
    if context == plan.model.text.max_position_embeddings:
        return None
    return context if context * _SPARE <= plan.kv.tokens else None


def _shm(plan: Plan) -> int:
    if plan.parallel.tp == 1:
        return 0
    if not plan.engine.is_pytorch:
        return _NCCL_SHM
    total = known(plan.machine.host.ram_total, 0)
    return _NCCL_SHM + (min(_RAY_MOST, int(total * _RAY_SHARE)) if total else _RAY_MOST)


class _Template(Template):
    """A template with fields like ``@{field}``: Compose and systemd use ``$`` themselves."""

    delimiter = "@"


def manifest(
    service: Service,
    kind: str,
    *,
    image: str = "turbofit:latest",
    claim: str | None = None,
    executable: str = "turbofit",
    user: str = SYSTEM_USER,
) -> str:
    """Fill ``presets/export/KIND.template``; ``kind`` is systemd, compose or k8s.

    Containers run ``image``, and read their keys from the variable TURBOFIT_API_KEYS or from the
    Secret ``NAME-keys``. ``claim`` names a PersistentVolumeClaim for the hub's cache, which
    otherwise each pod of Kubernetes fills anew. For systemd ``executable`` is the absolute path of
    ``turbofit``, and the unit runs as ``user``: `SYSTEM_USER` has caches of its own.
    """
    cards = f"{service.gpus} {plural(service.gpus, 'GPU')}: {service.card}"
    values: dict[str, object] = {name: getattr(service, name) for name in service.__struct_fields__}
    values |= {"cards": cards, "user": user, "image": image, "quoted_image": _quoted(image)}
    values["memory"] = _mebibytes(service.memory)
    if kind == "systemd":
        values |= _of_systemd(service, executable, user)
    elif kind == "compose":
        values |= _of_compose(service)
    else:
        values |= _of_k8s(service, claim)
    text = (presets_dir() / "export" / f"{kind}.template").read_text(encoding="utf-8")
    return _Template(text).substitute(values)


def _of_systemd(service: Service, executable: str, user: str) -> dict[str, object]:
    more = {"CUDA_VISIBLE_DEVICES": ",".join(service.uuids), "HF_HUB_CACHE": service.hub_cache}
    if user == SYSTEM_USER:
        state, cache = f"/var/lib/{service.name}", f"/var/cache/{service.name}"
        more |= {"HF_HUB_CACHE": None, "HF_HOME": cache, "HOME": state}
    variables = (_word(f"{name}={value}") for name, value in more.items() if value)
    argv = (executable, *service.argv[1:])
    return {
        "executable": " ".join(executable.split()),
        "command": " ".join(_word(word).replace("$", "$$") for word in argv),
        "model": " ".join(service.argv[2].split()).rstrip("\\").replace("%", "%%"),
        "more": _lines("Environment=", variables),
    }


def _of_compose(service: Service) -> dict[str, object]:
    # In the short form of a volume a colon separates its two paths.
    form = "{{type: bind, source: {0}, target: {0}, read_only: true}}"
    folders = [form.format(_quoted(_plain(service.folder)))] if service.folder else []
    ids = ", ".join(map(_quoted, service.uuids))
    shm = [f"{_mebibytes(service.shm)}m"] if service.shm else []
    return {
        "argv": _lines("    - ", (_quoted(_plain(word)) for word in service.argv)),
        "folders": _lines("    - ", folders),
        "devices": f"device_ids: [{ids}]" if ids else f"count: {service.gpus}",
        "shm": _lines("    shm_size: ", shm),
    }


def _of_k8s(service: Service, claim: str | None) -> dict[str, object]:
    parts = []
    if service.folder:
        place = _quoted(service.folder)
        parts.append(("model", place, f"hostPath: {{path: {place}, type: Directory}}"))
    if service.shm:
        medium = f"emptyDir: {{medium: Memory, sizeLimit: {_mebibytes(service.shm)}Mi}}"
        parts.append(("shm", "/dev/shm", medium))
    # $(NAME) would be a variable's value.
    argv = tuple(word.replace("$(", "$$(") for word in service.argv)
    mounts = (f"{{name: {name}, mountPath: {place}}}" for name, place, _ in parts)
    claimed = f"persistentVolumeClaim: {{claimName: {_quoted(claim or '')}}}"
    return {
        "argv": _lines("        - ", map(_quoted, argv)),
        "mounts": _lines("        - ", mounts),
        "volumes": _lines("      - ", (f"{{name: {name}, {of}}}" for name, _, of in parts)),
        "hub": claimed if claim else "emptyDir: {}",
        "deadline": service.start + 10,
        "periods": -(-service.start // 10),
    }


def _mebibytes(size: int) -> int:
    return -(-size >> 20)


def _lines(begin: str, texts: Iterable[str]) -> str:
    return "".join(f"{begin}{text}\n" for text in texts)


def _plain(word: str) -> str:
    """A word in which Compose finds no variable: each $ is doubled."""
    return word.replace("$", "$$")


def _quoted(word: str) -> str:
    """A quoted word of YAML: JSON's form, with YAML's escapes of characters that do not print."""
    return "".join(
        c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(word, ensure_ascii=False)
    )


def _word(text: str) -> str:
    """One word as systemd reads it: a quote opens at a word's beginning and closes at its end."""
    text = text.replace("%", "%%")
    if _PLAIN.fullmatch(text):
        return text
    signs = (_ESCAPED.get(sign) or (sign if sign.isprintable() else _code(sign)) for sign in text)
    return f'"{"".join(signs)}"'


def _code(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))


def exporter() -> str:
    """The user who exports, also through sudo; `SYSTEM_USER` if that is root."""
    name = getpass.getuser()
    name = os.environ.get("SUDO_USER", name) if name == "root" else name
    return SYSTEM_USER if name == "root" else name


def installed_program() -> str:
    """The path of the `turbofit` that runs here."""
    beside = Path(sys.executable).with_name("turbofit")
    return str(beside) if beside.exists() else shutil.which("turbofit") or "/usr/bin/turbofit"
