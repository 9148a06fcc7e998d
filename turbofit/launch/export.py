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
#: For NCCL between cards that do not reach each other. Source: NCCL's user guide, Docker.
_NCCL_SHM: Final = 1 << 30
#: Ray's object store as LMDeploy starts it: this share of host RAM, at most so much.
#: Source: lmdeploy pytorch/ray.py::_get_obj_store_memory #e802ab
_RAY_SHARE: Final = 0.3
_RAY_MOST: Final = 80 * 10**9
#: How many times the context a cache must hold for the context to be promised at the next start.
_SPARE: Final = 1.25
_NAME: Final = re.compile(r"[^a-z0-9]+")
#: Whom a unit runs as that root exports: root's own caches are not for it.
SYSTEM_USER: Final = "turbofit"
#: A word of systemd without quotes, and what a backslash stands before within them.
_PLAIN: Final = re.compile(r"[\w@%+=:,./$-]+", re.ASCII)
_ESCAPED: Final = {"\\": "\\\\", '"': '\\"'}


class Service(Struct):
    """A plan as something that is started again and again.

    ``memory``: bytes of host memory that the engines take; ``shm``: those that ``/dev/shm`` must
    hold, 0 where nothing needs it. ``uuids`` are empty where the plan was made for a preset.
    ``hub_cache`` is the hub's cache that holds the checkpoint, ``folder`` the checkpoint where the
    command names its path. ``start``: seconds until it must answer; ``stop``: until it has ended.
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
    """What to run for a plan, by default under the model's name.

    The command plans again at every start, with the plan's shape and with what it was asked for:
    other memory may be taken then, and GPUs may be others of the same kind.

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
    if not label[:1].isalpha():  # Kubernetes' Services begin so
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
    """What this plan was asked for, and its engine, shape and promises."""
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
    if not plan.by_group:  # unequal cards: no --tp and --replicas says which go together
        # Transformers' settings have no tp: there it is the GPUs of one copy.
        more["tp"] = max(plan.settings.tp, *map(len, plan.parallel.groups))
        more["replicas"] = plan.parallel.replicas
    if not request.given().keys() & {"context", "session_len"}:
        more["context"] = _promised_context(plan)
    rule, limit = model.image_rule, plan.limits.image_limit
    # A prediction's limit is what clients can do where nobody limits them.
    said = request.given().keys() & {"image_size", "max_pixels", "max_dynamic_patch"}
    if rule and limit and limit != rule.checkpoint_limit and not is_prediction(plan) and not said:
        more[rule.limit_name] = limit
    return request.changed(**more)


def _hub_cache(plan: Plan) -> PurePath | None:
    """The hub's cache where the checkpoint is a snapshot in it: links, useless without the rest."""
    source = plan.model.source
    if source.kind != "hub_cache" or source.checkpoint is None:
        return None
    snapshot = PurePath(source.checkpoint)
    return snapshot.parents[2] if snapshot.parent.name == "snapshots" else None


def _promised_context(plan: Plan) -> int | None:
    """The context, where it is the plan's choice and holds with somewhat less free, too.

    One that was lowered to what the cache held is left to the next start, whose cache may be a page
    smaller.
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
    """A text with ``@{field}``: ``$`` is Compose's own sign, and systemd's."""

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
    """The text of a manifest, of systemd, compose or k8s: ``presets/export/KIND.template`` filled.

    In containers, which ``image`` names, keys come from the variable TURBOFIT_API_KEYS or from the
    Secret ``NAME-keys``. ``claim``: a PersistentVolumeClaim for the hub's cache, which each pod of
    Kubernetes else fills anew. For systemd ``executable`` is the absolute path of ``turbofit``, and
    ``user`` whom the unit runs as: `SYSTEM_USER` has caches of its own.
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
    """A word without variables: $ is Compose's own."""
    return word.replace("$", "$$")


def _quoted(word: str) -> str:
    """A word of YAML: JSON's form, what cannot be printed as YAML escapes it."""
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
    """Who exports, also with sudo; a system user in the place of root."""
    name = getpass.getuser()
    name = os.environ.get("SUDO_USER", name) if name == "root" else name
    return SYSTEM_USER if name == "root" else name


def installed_program() -> str:
    """The path of the `turbofit` that runs here."""
    beside = Path(sys.executable).with_name("turbofit")
    return str(beside) if beside.exists() else shutil.which("turbofit") or "/usr/bin/turbofit"
