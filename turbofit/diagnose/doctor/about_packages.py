"""Driver, CUDA, torch and LMDeploy: whether they go together, read from files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.struct import NA
from turbofit.diagnose.doctor.about_kernels import capabilities, kernel_findings
from turbofit.diagnose.doctor.finding import Finding, ok, stops, unreadable, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.machine import Gpu, Machine
    from turbofit.diagnose.doctor.sources import Sources

__all__ = ["package_findings"]

_OLDEST: Final = (0, 16)
_NEWEST: Final = (0, 18)
#: The oldest driver of each CUDA generation (CUDA release notes, minor version compatibility).
_OLDEST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
_CUDA_LINE: Final = re.compile(r"^cuda(?:\s*:[^=]*)?\s*=\s*(?:'([\d.]+)'|None)", re.MULTILINE)
_REQUIREMENT: Final = re.compile(r"^([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?$")
_BOUND: Final = re.compile(r"(<=|>=|==|!=|~=|<|>)\s*(\d+(?:\.\d+)*)(\.\*)?")


def package_findings(sources: Sources, machine: Machine | None) -> Iterator[Finding]:
    """Findings about installed packages, and about them and the machine."""
    yield _lmdeploy(sources)
    yield _pairing(sources)
    yield _turbomind(sources)
    if sources.version("lmdeploy") is not None:
        yield _grammars(sources)
    cuda = torch_cuda(sources)
    yield _driver(sources, cuda, machine)
    gpus = [machine.gpu(index) for index in machine.visible] if machine else []
    yield _architectures(sources, cuda, gpus)
    yield from kernel_findings(sources, gpus)


def torch_cuda(sources: Sources) -> str | None:
    """The CUDA that torch was built for: "" for a CPU build, None where no file tells."""
    folder = sources.package_folder("torch")
    if folder is None:
        return None
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = _CUDA_LINE.search(text)
    return None if match is None else match[1] or ""


def _lmdeploy(sources: Sources) -> Finding:
    check, found = "lmdeploy", sources.version("lmdeploy")
    if found is None:
        return stops(
            check,
            "LMDeploy is not installed in this environment",
            "turbofit plans without it, but has nothing to launch",
            'pip install "turbofit[lmdeploy]"',
        )
    release = numbers(found)[:2]
    if release < _OLDEST:
        return stops(
            check,
            f"LMDeploy {found}",
            "its vision tower and cache work otherwise than turbofit's account: serve needs 0.16",
            'pip install -U "turbofit[lmdeploy]"',
        )
    if release > _NEWEST:
        return warning(
            check,
            f"LMDeploy {found}",
            "newer than 0.18, on whose account plans rest: margins are doubled",
            "use 0.18, or rehearse each plan",
        )
    if release in (_OLDEST, (0, 17)):
        return warning(
            check,
            f"LMDeploy {found}",
            "it pins 18.7 GiB of host memory a rank for InternVL",
            'pip install "lmdeploy==0.18.*"',
        )
    return ok(check, f"LMDeploy {found}")


def _pairing(sources: Sources) -> Finding:
    """Whether the installed torch and transformers are what LMDeploy's metadata demand."""
    check = "pairing"
    demands = sources.requires("lmdeploy")
    if demands is None:
        return unreadable(check, "LMDeploy's metadata", "which torch it goes with is not known")
    wrong, seen = [], []
    for demand in demands:
        match = _REQUIREMENT.match(demand)
        if match is None or match[1].lower() not in ("torch", "transformers", "triton"):
            continue
        if match[3] and not _applies(match[3]):
            continue
        name, found = match[1].lower(), sources.version(match[1].lower())
        if found is None:
            if name != "triton":
                wrong.append(f"{name} is not installed")
            continue
        seen.append(f"{name} {found}")
        if not satisfies(found, match[2]):
            wrong.append(f"{name} {found} instead of {match[2].strip()}")
    if wrong:
        return warning(
            check,
            "; ".join(wrong),
            "LMDeploy's wheels are built and tested against the versions that they demand",
            "install LMDeploy in an environment of its own and let pip choose",
        )
    if not seen:
        return unreadable(check, "no demand on torch", "LMDeploy's metadata name no version")
    return ok(check, f"{', '.join(seen)}, as LMDeploy demands")


def _applies(marker: str) -> bool:
    """Environment markers: only extras and platforms matter here."""
    return "extra ==" not in marker and "win32" not in marker and "darwin" not in marker


def _turbomind(sources: Sources) -> Finding:
    check = "turbomind"
    folder = sources.package_folder("lmdeploy")
    if folder is None:
        return unreadable(check, "LMDeploy's folder", "whether its engine is there is not known")
    for place in ("lib", "turbomind", "turbomind/lib"):
        found = sorted((folder / place).glob("_turbomind*.so"))
        if found:
            return ok(check, f"{found[0].name}")
    return stops(
        check,
        f"{folder.name} has no _turbomind library",
        "without its native engine LMDeploy falls back to PyTorch, which turbofit does not plan",
        "install LMDeploy's wheel for this Python version instead of a source checkout",
    )


def _grammars(sources: Sources) -> Finding:
    """XGrammar, without which LMDeploy has no structured output (``_guided_decoding.py``)."""
    check, found = "xgrammar", sources.version("xgrammar")
    if found is not None or sources.has_module("xgrammar"):
        return ok(check, f"xgrammar {found or 'of no known version'}")
    return warning(
        check,
        "xgrammar is not installed",
        "requests with a response_format or a forced tool call are refused, and LMDeploy's PyTorch"
        " engine does not start (TurboMind does)",
        "pip install xgrammar",
    )


def _driver(sources: Sources, cuda: str | None, machine: Machine | None) -> Finding:
    """Driver against torch's CUDA: the same major is enough, by minor version compatibility."""
    check = "driver_cuda"
    if machine is None or NA in (machine.driver, machine.cuda):
        return unreadable(
            check, "the driver's version", "a driver older than torch's CUDA stops every engine"
        )
    driver = f"driver {machine.driver} (CUDA {machine.cuda})"
    if cuda is None:
        version = sources.version("torch")
        what = f"torch {version}" if version else "torch"
        return unreadable(check, f"{what}'s CUDA, beside {driver}", "they must go together")
    if cuda == "":
        return stops(
            check,
            f"torch {sources.version('torch')} is a CPU build, beside {driver}",
            "LMDeploy loads weights through torch on the GPU",
            "install torch's CUDA build (pip install torch without a cpu index)",
        )
    major = numbers(cuda)[0]
    if numbers(machine.cuda)[0] < major:
        need = _OLDEST_DRIVER.get(major)
        return stops(
            check,
            f"torch is built for CUDA {cuda}, the {driver} stops at {machine.cuda}",
            "torch sees no GPU with a driver of an older CUDA generation",
            f"update the driver{f' to {need} or newer' if need else ''}, or install torch for CUDA"
            f" {numbers(machine.cuda)[0]}",
        )
    need = _OLDEST_DRIVER.get(major)
    if need and numbers(machine.driver)[0] < need:
        return stops(
            check,
            f"torch is built for CUDA {cuda}, {driver}",
            f"CUDA {major} needs a driver from {need} on",
            f"update the driver to {need} or newer",
        )
    return ok(check, f"torch for CUDA {cuda}, {driver}")


def _architectures(sources: Sources, cuda: str | None, gpus: Sequence[Gpu]) -> Finding:
    """Torch's compiled architectures against the cards; asked in a child, with a deadline."""
    check = "torch_architectures"
    cards = capabilities(gpus)
    if not cards:
        return unreadable(
            check, "the cards' compute capability", "wheels carry code for some cards only"
        )
    if cuda is None or cuda == "":
        return unreadable(check, "torch's architectures", "this torch has no CUDA, or is missing")
    built = sources.torch_architectures()
    if not built:
        return unreadable(
            check,
            "torch did not say in time what it was compiled for",
            "a wheel without code for a card fails at its first kernel: CUDA 13 has none for Volta"
            " (V100) any more",
            'python -c "import torch; print(torch.cuda.get_arch_list())"',
        )
    lacking = [name for name, version in cards.items() if not _runs(version, built)]
    if lacking:
        return stops(
            check,
            f"torch has code for {', '.join(built)}; not for {', '.join(lacking)}",
            "the first kernel on such a card fails: no kernel image is available",
            "install torch for CUDA 12.x, whose wheels still have Volta"
            if any(cards[name] < (7, 5) for name in lacking)
            else "install a torch whose wheel has code for this card",
        )
    return ok(check, f"torch has code for {', '.join(cards)}")


def _runs(card: tuple[int, int], built: Sequence[str]) -> bool:
    """Native code of the same major and at most the card's minor, or PTX of anything older."""
    for name in built:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not match:
            continue
        version = (int(match[2]), int(match[3]))
        if match[1] == "compute" and version <= card:
            return True
        if match[4]:
            if version == card:
                return True
        elif version[0] == card[0] and version <= card:
            return True
    return False


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``<=2.10.0,>=2.0.0``."""
    have = numbers(version)
    for operator, text, wild in _BOUND.findall(bounds):
        want = numbers(text)
        if wild:
            if (have[: len(want)] == want) != (operator == "=="):
                return False
            continue
        size = max(len(have), len(want))
        a, b = (part + (0,) * (size - len(part)) for part in (have, want))
        fits = {
            "<=": a <= b, ">=": a >= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b,
            "~=": a >= b and a[: max(1, len(want) - 1)] == b[: max(1, len(want) - 1)],
        }  # fmt: skip
        if not fits[operator]:
            return False
    return True
