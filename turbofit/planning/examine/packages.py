"""Checks whether the driver, CUDA, torch, LMDeploy and LMDeploy's packages match each other.

The checks only read files. The only package that is imported is torch, by a child process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final

from turbofit.core.errors import PackageError
from turbofit.core.installation import install_command
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import Plan
from turbofit.core.presets import read_preset
from turbofit.core.struct import NA, Struct
from turbofit.core.version import REFERENCE
from turbofit.memory.known_bad import all_problems
from turbofit.memory.versions import OLDEST_SERVED, between, release
from turbofit.planning.examine.scene import Answer, Scene, Sources, ok, stops, unreadable, warning

#: The oldest driver for each CUDA generation (CUDA release notes, minor version compatibility).
_OLDEST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
_CUDA_LINE: Final = re.compile(r"^cuda(?:\s*:[^=]*)?\s*=\s*(?:'([\d.]+)'|None)", re.MULTILINE)
#: By architecture, where a check adds what pretend GPUs do if Transformers fails with its images.
_MENDED: Final = {
    "LlavaForConditionalGeneration": "pretend GPUs read its images as Transformers 5.21 does",
}
#: An architecture, and the module that LMDeploy imports to parse its answers:
#: lmdeploy api_server.py::set_parsers #14c093
_HARMONY: Final = ("GptOssForCausalLM", "openai_harmony")
#: The packages whose versions LMDeploy's engines depend on most.
_PAIRED: Final = ("torch", "transformers")
#: The modules with kernels of gated delta nets:
#: lmdeploy nn/gated_delta.py `from fla.modules import`
_DELTA: Final = {"pytorch": ("fla", "tilelang")}
#: FlashAttention-3, by which LMDeploy decodes several tokens of a sequence at once:
#: lmdeploy attention/__init__.py::require_fa3_for_speculative_decoding #42332f
_FLASH: Final = "flash_attn_interface"
#: FlashMLA, which takes its place for latents:
#: lmdeploy graph_runner/runner.py::_validate_speculative_decoding #1b7966
_FLASH_MLA: Final = "flash_mla"
#: What pip installs for a module whose package has another name, or no name on PyPI.
_PACKAGES: Final = {
    "fla": "flash-linear-attention",
    _FLASH: "flash-attn-3==3.0.0",  # a wheel of PyTorch's own index, as in LMDeploy's image
    _FLASH_MLA: "git+https://github.com/deepseek-ai/FlashMLA.git",  # compiled there
}


def lmdeploy(sources: Sources, _: Scene) -> Answer:
    """Check that LMDeploy is installed, and that the account of memory is of its version."""
    version = sources.version("lmdeploy")
    if version is None:
        return stops(
            "LMDeploy is not installed in this environment",
            install_command("lmdeploy"),
            "turbofit plans without it, but has nothing to launch",
        )
    numbers, text = release(version), f"LMDeploy {version}"
    if numbers < OLDEST_SERVED:
        why = "vision tower and cache differ from turbofit's account: serve needs 0.16"
        holes = [row.cause for row in all_problems() if row.advisory and row.has(version)]
        return stops(text, install_command("lmdeploy", upgrade=True), "; ".join([why, *holes]))
    if numbers > release(REFERENCE):
        why = f"plans rest on the account of {REFERENCE}, an older version: margins are doubled"
        return warning(text, f"use {REFERENCE}, or rehearse each plan", why)
    return ok(text)


def pairing(sources: Sources, _: Scene) -> Answer:
    """Compare the installed torch and Transformers with what LMDeploy's metadata requires.

    A CPU build of torch runs on pretend GPUs alone (`driver_cuda` stops it on a card), and only its
    newest version is on the usual indexes: it is not compared.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    required = [Requirement(text) for text in sources.requires("lmdeploy") if ";" not in text]
    if not required:
        return unreadable("LMDeploy's metadata")
    wrong = []
    pretends = torch_cuda(sources) == ""
    for package in required:
        compared = package.name in _PAIRED and not (pretends and package.name == "torch")
        here = compared and sources.version(package.name)
        if here and Version(here).base_version not in package.specifier:
            wrong.append(f"{package.name} {here} instead of {package.specifier}")
    if not wrong:
        return ok("torch and Transformers as LMDeploy requires them")
    return warning("; ".join(wrong), "install LMDeploy in an environment of its own")


def driver_cuda(machine: Machine, scene: Scene) -> Answer:
    """Check that the driver supports the CUDA that torch was built for.

    An equal or newer major version is enough (minor version compatibility).
    """
    if NA in (machine.driver, machine.cuda):
        return unreadable("the driver's version")
    cuda, torch = torch_cuda(scene.sources), scene.sources.version("torch")
    driver = f"driver {machine.driver} (CUDA {machine.cuda})"
    if cuda is None:
        return unreadable(f"the CUDA of torch {torch or '(none)'}, beside {driver}")
    if cuda == "":
        return stops(
            f"torch {torch} is a CPU build, beside {driver}",
            "install torch's CUDA build (pip install torch without a cpu index)",
            "LMDeploy loads weights through torch on the GPU",
        )
    major, here = release(cuda)[0], release(machine.cuda)[0]
    if here < major:
        need = _OLDEST_DRIVER.get(major)
        return stops(
            f"torch is built for CUDA {cuda}, the {driver} stops at {machine.cuda}",
            f"update the driver{f' to {need} or newer' if need else ''}, or install torch for CUDA"
            f" {here}",
            "torch sees no GPU with a driver of an older CUDA generation",
        )
    return ok(f"torch for CUDA {cuda}, {driver}")


def torch_cuda(sources: Sources) -> str | None:
    """Return the CUDA version of the installed torch: "" for a CPU build, None if unknown."""
    folder = sources.package_folder("torch")
    try:
        text = "" if folder is None else (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = _CUDA_LINE.search(text)
    return None if match is None else match[1] or ""


def torch_architectures(machine: Machine, scene: Scene) -> Answer:
    """Check that torch was compiled for the architectures of the cards.

    A child process imports torch, with a time limit.
    """
    sources, cards = scene.sources, _capabilities(machine)
    if not cards:
        return unreadable("the cards' compute capability")
    if not torch_cuda(sources):
        return unreadable("torch's architectures: it has no CUDA, or is missing")
    built = sources.torch_architectures()
    if not built:
        return unreadable(
            "torch did not say in time what it was compiled for",
            'python -c "import torch; print(torch.cuda.get_arch_list())"',
        )
    lacking = [name for name, version in cards.items() if not _runs(version, built)]
    if lacking:
        return stops(
            f"torch has code for {', '.join(built)}; not for {', '.join(lacking)}",
            "install a torch with code for this card; wheels for CUDA 12.x have code for Volta",
        )
    return ok(f"torch has code for {', '.join(cards)}")


def _runs(card: tuple[int, int], built: Sequence[str]) -> bool:
    """Return whether a card runs any of the code for the architectures in ``built``.

    A card runs native code (``sm_86``) of its own major version, and PTX (``compute_80``) of any
    version, both up to the card's version. Architectures whose names end in a letter are ignored:
    torch also has their plain architecture.
    """
    plain = (re.fullmatch(r"(sm|compute)_(\d+)(\d)", name) for name in built)
    versions = [(match[1], (int(match[2]), int(match[3]))) for match in plain if match]
    return any(
        version <= card and (kind == "compute" or version[0] == card[0])
        for kind, version in versions
    )


def _capabilities(machine: Machine) -> dict[str, tuple[int, int]]:
    """Return the compute capability of each visible card by its name, if it is known."""
    gpus = [machine.gpu(index) for index in machine.visible]
    return {gpu.name: gpu.compute_capability for gpu in gpus if gpu.compute_capability != NA}


def kernels(machine: Machine, scene: Scene) -> Answer | None:
    """Check that TurboMind has code for each card.

    Kernels for special formats of weights are not checked.
    """
    cards = _capabilities(machine)
    if not cards:
        return None
    census = scene.sources.kernels()
    if census is None and scene.sources.version("lmdeploy") is None:
        return unreadable("the kernels of TurboMind")
    if census is None:
        return stops(
            "TurboMind's library is not installed",
            "install LMDeploy's wheel for this Python version instead of a source checkout, or plan"
            " with --engine pytorch",
            "without the library LMDeploy starts its PyTorch engine in TurboMind's place, and a"
            " plan for TurboMind does not hold",
        )
    without = [name for name, version in cards.items() if not census.runs(version)]
    if without:
        return stops(
            f"TurboMind has no code for {', '.join(without)}, only for"
            f" {census.architecture_names()}",
            "leave these GPUs out with --gpus, or plan with --engine pytorch where Triton compiles"
            " for them",
            "TurboMind fails at its first kernel on such a card",
        )
    return ok(f"TurboMind has code for {', '.join(cards)}")


class BadTransformers(Struct, forbid_unknown_fields=True):
    """A range of Transformers versions with which some families of models fail.

    ``first`` and ``last`` are the first and the last version of the range; None: there is no such
    bound. ``what`` is the effect, ``error`` LMDeploy's message, and ``install`` the requirements
    for pip that help, the newest first.
    """

    architectures: tuple[str, ...]
    engines: tuple[str, ...]
    what: str
    error: str
    sources: tuple[str, ...]
    first: str | None = None
    last: str | None = None
    install: tuple[str, ...] = ()

    def has(self, transformers: str) -> bool:
        """Return whether a version is in the range; an unreadable version is in no range."""
        return between(transformers, self.first, self.last)


class TriedTransformers(Struct, forbid_unknown_fields=True):
    """The newest Transformers that LMDeploy was run with, and the versions that fail."""

    newest: str
    rows: tuple[BadTransformers, ...]


@cache
def tried_transformers() -> TriedTransformers:
    """Return the table of `presets/engines/known-bad.yaml`."""
    return read_preset("engines", "known-bad", TriedTransformers, "transformers")


def bad_transformers(
    architecture: str, engines: Iterable[str], transformers: str | None = None
) -> dict[str, BadTransformers]:
    """Return, for each engine that fails with an architecture, the range of versions that fails.

    If a version ``transformers`` is given, ranges that do not contain this version are left out.
    """
    return {
        engine: row
        for engine in engines
        for row in tried_transformers().rows
        if engine in row.engines
        and architecture in row.architectures
        and (transformers is None or row.has(transformers))
    }


def front_ends(sources: Sources, scene: Scene) -> Answer | None:
    """Check that the installed LMDeploy and Transformers run the model together.

    Without a plan to launch here, the answer says which versions to install on the other machine
    if newer versions fail.
    """
    plan = scene.plan
    if plan is not None:
        if plan.model.vision is None or not plan.backend.of_lmdeploy:
            return None
        if scene.when == "plan":
            return _wanted_elsewhere(plan)
    model, engines = _served(scene)
    if model is None or model.vision is None:
        return None
    here, transformers = sources.version("lmdeploy"), sources.version("transformers")
    if here is None or transformers is None:
        return unreadable("LMDeploy and Transformers are not both installed")
    found = bad_transformers(model.architecture, engines, transformers)
    text = f"{model.name}, LMDeploy {here}, Transformers {transformers}"
    if not found:
        return ok(text)
    problems = "; ".join(f"{engine} {row.what} ({row.error})" for engine, row in found.items())
    install = next((row.install for row in found.values() if row.install), ())
    fix = " or ".join(f"pip install '{one}'" for one in install)
    fix = fix or "use another model, or --engine transformers"
    mended = _MENDED.get(model.architecture) if scene.pretend else None
    if mended:
        return warning(f"{text}: {problems}; {mended}", fix)
    state = stops if len(found) == len(engines) else warning  # warning: the other engine serves
    return state(f"{text}: {problems}", fix)


def _wanted_elsewhere(plan: Plan) -> Answer | None:
    """Return a warning if newer versions of Transformers fail with a plan's model, else None.

    If only older versions fail, pip installs a version that works.
    """
    found = bad_transformers(plan.model.architecture, [plan.backend.name])
    row = found.get(plan.backend.name)
    if row is None or row.first is None or not row.install:
        return None
    effect = f"LMDeploy {plan.backend.version} {row.what}"
    return warning(f"{effect} without {' or '.join(row.install)}", "")


def _served(scene: Scene) -> tuple[Model | None, list[str]]:
    """Return the model to serve, and the plan's engine or LMDeploy's engines that run the model."""
    from turbofit.memory.engines import LMDEPLOY
    from turbofit.model.families.engines import engine_problem

    if scene.plan is not None:
        return scene.plan.model, [scene.plan.backend.name]
    model = scene.model
    return model, [name for name in LMDEPLOY if model and engine_problem(model, name) is None]


def modules(sources: Sources, scene: Scene) -> Answer | None:
    """Check that the modules that LMDeploy imports for a model exist.

    The answer is only a warning if another engine of LMDeploy has all its modules.
    """
    plan = scene.plan
    model, engines = _served(scene)
    if model is None or (plan is not None and (scene.pretend or not plan.backend.of_lmdeploy)):
        return None  # pretend GPUs have stand-ins for these modules
    if sources.version("lmdeploy") is None:
        return unreadable("LMDeploy is not installed here")
    missing = {engine: _missing(sources, model, engine) for engine in engines}
    lacking = {engine: lacks for engine, lacks in missing.items() if lacks}
    if not lacking:
        return ok(f"no module that {model.name} needs is missing")
    text = "; ".join(
        f"{engine}: {', '.join(lacks)} not installed" for engine, lacks in lacking.items()
    )
    modules = dict.fromkeys(module for lacks in lacking.values() for module in lacks)
    fix = " ".join(["pip install", *(_PACKAGES.get(module, module) for module in modules)])
    state = stops if len(lacking) == len(engines) else warning
    return state(f"{model.name} on {text}", fix)


def _missing(sources: Sources, model: Model, engine: str) -> list[str]:
    """Return the uninstalled modules that an engine of LMDeploy imports for a model."""
    wanted = [_HARMONY[1]] if model.architecture == _HARMONY[0] else []
    wanted += _DELTA.get(engine, ()) if model.text.delta is not None else ()
    wanted += ["peft"] if model.loras else []
    latent = model.text.cached_latent is not None
    wanted += [_FLASH_MLA if latent else _FLASH] if model.draft else []
    return [module for module in wanted if not sources.has_module(module)]


def image_library(sources: Sources, _: Scene) -> Answer:
    """Check the library that resizes images, which turbofit's installation compiled."""
    try:
        return ok(sources.image_library().name)
    except PackageError as exc:
        state = warning if exc.hint else ok
        return state(f"Pillow alone resizes images: {exc.message}", exc.hint)
