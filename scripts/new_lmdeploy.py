"""What a newer release of LMDeploy changes for turbofit, as one page for whoever follows it.

    scripts/new-lmdeploy WHEEL|VERSION [--against WHEEL|VERSION] [--without STEP…] [--out PAGE]
        [--write]

Both wheels are unpacked (a version is fetched by pip, without what it needs) and compared: the code
that turbofit cites (`scripts.citations`), options, routes, request fields, settings,
architectures, requirements, kernels, and the functions of CUDA that TurboMind calls. Then it runs,
before the installed one on Python's path: prices of grammars (`bench.gateway.prices`), tests of
REST, and rehearsals of ten presets. The page has first what a person must decide, then what differs
and stands in turbofit already, then what is equal. ``--write`` writes the newer one's preset of
kernels, and adds to the table of `lmdeploy serve api_server` the options that it lacks, for a
person to decide.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import yaml

from scripts.citations import ROOT, Citation, citations, digest, files_of, named, state
from turbofit.core.errors import TurbofitError
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.units import MIB
from turbofit.core.version import REFERENCE
from turbofit.gateway.http.routes import MANAGEMENT, ROUTES
from turbofit.gateway.limits.ranges import GENERATION, RULES
from turbofit.machine.kernels.census import take_census
from turbofit.memory.account import PAGE
from turbofit.memory.known_bad import all_problems
from turbofit.memory.legacy.generations import generation_of
from turbofit.memory.versions import is_legacy, listed_since
from turbofit.model.families.dims import unplanned
from turbofit.rehearsal.pretend.build import build
from turbofit.rehearsal.pretend.command import cuda_site
from turbofit.rehearsal.pretend.libraries import check_surface
from turbofit.serving.passthrough import engine_options

#: Of unlike kinds: towers, text, experts, delta nets, packed weights, both engines, three cards.
REHEARSED: Final = {
    "internvl2-1b": "1xrtx4090", "internvl3-1b-hf": "1xrtx4090", "internvl2-2b-awq": "1xrtx4090",
    "qwen2-vl-2b": "1xrtx4090", "qwen2.5-vl-3b-awq": "1xrtx4090", "qwen3.5-4b": "1xrtx4090",
    "qwen3-4b": "1xh100", "qwen3-vl-2b": "1xrtx4090", "minicpm3-4b": "1xrtx4090",
    "deepseek-v2-lite": "1xa100-40g",
}  # fmt: skip
POOL_STEP: Final = 32 * MIB
#: What runs in one process each: its arguments, and the lines of it that are a problem. Two kinds
#: of grammars are left out: those that take tens of seconds, and those that take longer only
#: because the vocabulary is made up.
_PROGRAMS: Final = {
    "grammars": (
        ["-m", "bench.gateway.prices", "required", "optional", "enum", "alternatives", "(a"],
        r"^.*(?:refused|failed \| .*|not within .*) \|$",
    ),
    "rest": (
        ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
         "tests/gateway/test_oracle_lmdeploy.py", "tests/serving/test_passthrough.py"],
        r"^(?:FAILED|ERROR) .*",
    ),
}  # fmt: skip
_STEPS: Final = (*_PROGRAMS, "rehearsals")
_OPTIONS: Final = "import json, scripts.new_lmdeploy as it; print(json.dumps(it.parser_options()))"
#: Which wheels of a release have a library whose hash is kept.
_PYTHONS: Final = ("3.10", "3.11", "3.12", "3.13", "3.14")
_KERNELS: Final = """\
# The kernels of TurboMind in the wheel of LMDeploy {version}, read from its library. A cell is how
# many kernels of a family hold code for an architecture, and after a + how many are empty: their
# host part launches them, and nothing is computed. `libraries`: SHA-256 of the library in the
# wheels for Python 3.10 to 3.14.
"""
#: Of the routes that clients reach.
_REQUESTS: Final = (
    "(ChatCompletion|Completion|Messages|CountTokens|Encode|Responses)Request|GenerateReqInput"
)
_METHODS: Final = ("get", "post", "put", "delete", "api_route")


class Difference(NamedTuple):
    """What is not as it was, what of turbofit rests on it, and what turbofit has of it already."""

    kind: str
    what: str
    rests: str = ""
    known: str = ""


class ParserOption(NamedTuple):
    """An option of LMDeploy's parser: how many words follow it, its default and its choices."""

    values: int | str
    default: str
    choices: list[str | int | None] | None


class Ran(NamedTuple):
    """What a step on the newer release came to."""

    name: str
    problem: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a person must decide something."""
    parser = argparse.ArgumentParser(
        prog="scripts/new-lmdeploy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("wheel", help="a wheel or a version that pip can fetch")
    parser.add_argument("--against", default=f"{REFERENCE}.0", help="the same of the older one")
    parser.add_argument("--source", type=Path, help="a checkout of the newer one: C++ sources")
    parser.add_argument("--old-source", type=Path, help="a checkout of the older one")
    parser.add_argument("--without", nargs="+", default=[], choices=_STEPS, help="steps left out")
    parser.add_argument("--write", action="store_true", help="write presets of the newer one")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "new-lmdeploy")
    parser.add_argument("--out", type=Path, help="write the page there")
    options = parser.parse_args(argv)
    old, new = (unpacked(one, options.cache) for one in (options.against, options.wheel))
    found = list(compared(old, new, options.old_source, options.source))
    if options.write:
        write_kernels(new, options.cache)
        table = preset_path("engines", "lmdeploy-options")
        version = ".".join(new.name.split(".")[:2])
        text = with_options(table.read_text(encoding="utf-8"), version, _parser_of(new))
        table.write_text(text, encoding="utf-8")
    ran = []
    for step in (one for one in _STEPS if one not in options.without):
        for one in _run(step, new):
            print(f"{one.name}: {one.problem or 'as it was'}, {one.seconds:.0f} s", file=sys.stderr)
            ran.append(one)
    text = page(old.name, new.name, found, ran)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)
    return int(any(not one.known for one in found) or any(one.problem for one in ran))


def unpacked(wheel: str, cache: Path) -> Path:
    """The folder with what a wheel holds, named by its version."""
    path = Path(wheel)
    if not path.is_file():
        path = _downloaded(wheel, ".".join(map(str, sys.version_info[:2])), cache)
    folder = cache / path.name.split("-")[1]
    if not folder.is_dir():
        with zipfile.ZipFile(path) as file:
            file.extractall(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return folder


def _downloaded(version: str, python: str, cache: Path) -> Path:
    """A release's wheel for a version of Python."""
    folder, tag = cache / "wheels", f"cp{python.replace('.', '')}"
    if not list(folder.glob(f"lmdeploy-{version}-{tag}-*.whl")):
        platforms = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64")
        # An environment that uv made has no pip of its own.
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["pip"]
        subprocess.run(
            [*pip, "download", "--quiet", "--no-deps", "--only-binary",
             ":all:", "--python-version", python, *platforms, "--dest", str(folder),
             f"lmdeploy=={version}"], check=True,
        )  # fmt: skip
    return next(folder.glob(f"lmdeploy-{version}-{tag}-*.whl"))


def write_kernels(wheel: Path, cache: Path) -> Path:
    """Writes the preset of a release's kernels; returns its path."""
    census, hashes = take_census(_library(wheel)), []
    for python in _PYTHONS:
        with zipfile.ZipFile(_downloaded(wheel.name, python, cache)) as file:
            record = next(name for name in file.namelist() if name.endswith(".dist-info/RECORD"))
            text = file.read(record).decode()
        hashes += re.findall(r"/_turbomind\.[^,]+,sha256=([^,]+),", text)
    columns = census.architectures
    counts = {name: [census.count([name], one) for one in columns] for name in census.families}
    values = {
        "library": census.library, "architectures": " ".join(columns), "ptx": " ".join(census.ptx),
        "families": {
            name: " ".join(f"{one.code}+{one.empty}" if one.empty else str(one.code) for one in row)
            for name, row in counts.items()
        },
        "libraries": {wheel.name: hashes},
    }  # fmt: skip
    path = preset_path("engines/kernels", f"turbomind-{wheel.name}")
    text = yaml.safe_dump(values, sort_keys=False, width=110)
    path.write_text(_KERNELS.format(version=wheel.name) + text, encoding="utf-8")
    return path


def cited_places() -> dict[str, list[Citation]]:
    """The citations of LMDeploy, by what they cite."""
    cited: dict[str, list[Citation]] = {}
    for one in citations():
        if one.package == "lmdeploy":
            cited.setdefault(one.cited, []).append(one)
    return cited


def compared(
    old: Path, new: Path, old_source: Path | None = None, source: Path | None = None
) -> Iterator[Difference]:
    """All that differs between two unpacked wheels and matters to turbofit.

    Args:
        old: the older one's folder.
        new: the newer one's.
        old_source: a checkout of the older one.
        source: a checkout of the newer one.
    """
    before, after = old / "lmdeploy", new / "lmdeploy"
    for what, places in cited_places().items():
        said = _became(places[0], before, after, old_source, source)
        if said:
            where = (f"{one.file}:{one.line} {_subject(one)}" for one in places)
            yield Difference("cited code", f"`{what.replace('`', '')}` {said}", "; ".join(where))
    for kind, read, holds in _TABLES:
        was, now = read(old), read(new)
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                what = _told(name, was.get(name), now.get(name))
                yield Difference(kind, what, *holds(name, new))
    yield from _missing_functions(old, new)


def _told(name: str, was: str | None, now: str | None) -> str:
    if was is None:
        return f"`{name}` is new{f': {now}' if now else ''}"
    return f"`{name}` is gone" if now is None else f"`{name}`: {was} → {now}"


def _became(
    one: Citation, before: Path, after: Path, old_source: Path | None, source: Path | None
) -> str:
    """What became of a citation, in words; empty where it stands as it stood."""
    if not one.digest:
        was, now = state(one, before, old_source), state(one, after, source)
        if was == now or (now == "unseen" and source is None and was != "equal"):
            return ""
        return "came" if now == "equal" else "is gone" if was == "equal" else ""
    was, now = (_node(one, folder) for folder in (before, after))
    if was is None or now is None:
        if now is not None:
            return "came"
        if was is None:
            return ""
        return f"is gone{_elsewhere(one, after, digest(was))}"
    if digest(was) == digest(now):
        return ""
    lines = [set(ast.unparse(node).splitlines()) for node in (was, now)]
    return f"changed (+{len(lines[1] - lines[0])} −{len(lines[0] - lines[1])} lines)"


def _node(one: Citation, package: Path) -> ast.AST | None:
    found = files_of(package, one.path)
    return named(found[0].read_text(encoding="utf-8"), one.name) if len(found) == 1 else None


def _elsewhere(one: Citation, package: Path, wanted: str) -> str:
    """Where else the name stands now."""
    name = one.name.rpartition(".")[2]
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if name in text and (node := named(text, one.name) or named(text, name)) is not None:
            same = "as it was" if digest(node) == wanted else "changed"
            return f": in {path.relative_to(package)} now, {same}"
    return ""


def _subject(one: Citation) -> str:
    """The figure, function or constant that a citation stands at."""
    lines = (ROOT / one.file).read_text(encoding="utf-8").splitlines()
    if one.file.endswith(".yaml"):
        keys = (line.split(":")[0] for line in reversed(lines[: one.line]) if line[:1].isalpha())
        return next(keys, "")
    tree = ast.parse("\n".join(lines))
    if tree.body and (tree.body[0].end_lineno or 0) >= one.line:
        return ""
    inside = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and node.lineno <= one.line <= (node.end_lineno or 0)
    ]
    if inside:
        return inside[-1]
    rest = "\n".join(line.partition("#")[0] for line in lines[one.line - 1 :])
    found = re.search(r'^\s*"?([A-Za-z_]\w*)"?(?:: \w[\w\[\], .]*)? ?[:=] ', rest, re.MULTILINE)
    return found[1] if found else ""


def parser_options() -> dict[str, ParserOption]:
    """The options of the importable LMDeploy's server, as its parser has them."""
    from lmdeploy.cli.serve import SubCliServe

    if "api_server" not in SubCliServe.subparsers.choices:
        SubCliServe.add_parsers()
    return {
        name: ParserOption(1 if one.nargs is None else one.nargs, str(one.default), one.choices)
        for one in SubCliServe.subparsers.choices["api_server"]._actions
        for name in one.option_strings
    }


def _parser_of(wheel: Path) -> dict[str, ParserOption]:
    done = subprocess.run(
        [sys.executable, "-c", _OPTIONS], env=_environment(wheel), check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return {
        name: ParserOption(*one) for name, one in json.loads(done.stdout.splitlines()[-1]).items()
    }


def _options(wheel: Path) -> dict[str, str]:
    return {
        name: one.default + (f", of {list(one.choices)}" if one.choices else "")
        for name, one in _parser_of(wheel).items()
    }


def with_options(text: str, version: str, found: dict[str, ParserOption]) -> str:
    """The table of options with what a version has beside it, `undecided`, and what it lacks."""
    table = engine_options()
    rows = [
        f"  {name}: {{is: undecided, values: {json.dumps(one.values)}}}\n"
        for name, one in found.items() if name not in table
    ]  # fmt: skip
    lacks = [name for name, option in table.items() if option.until is None and name not in found]
    line = f'  "{version}": [{", ".join(lacks)}]\n'
    text = re.sub(rf'(?m)^  "{re.escape(version)}": .*\n', "", text)
    return text.replace("options:\n", f"{line}options:\n", 1) + "".join(rows)


def _routes(wheel: Path) -> dict[str, str]:
    return {
        f"{node.func.attr.upper()} {node.args[0].value}": ""
        for tree in _trees(wheel, "serve/**/*.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr in _METHODS and node.args and isinstance(node.args[0], ast.Constant)
        and str(node.args[0].value).startswith("/")
    }  # fmt: skip


def _fields(wheel: Path, pattern: str, classes: str) -> dict[str, str]:
    """The fields of classes, each with its default where a class of settings has them."""
    return {
        f"{node.name}.{ast.unparse(field.target)}": ast.unparse(field.value) if field.value else ""
        for tree in _trees(wheel, pattern)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and re.fullmatch(classes, node.name)
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }


def _architectures(wheel: Path) -> dict[str, str]:
    return {
        f"{path.split('/')[0]}: {key.value}": ""
        for path in ("turbomind/supported_models.py", "pytorch/models/module_map.py")
        for tree in _trees(wheel, path)
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def _modules(wheel: Path) -> dict[str, str]:
    """The modules that say which weights TurboMind holds; nobody counts those of a new one."""
    folder = wheel / "lmdeploy" / "turbomind"
    files = (file for room in ("builders", "models") for file in (folder / room).glob("*.py"))
    return {str(file.relative_to(folder)): "" for file in files}


def _requirements(wheel: Path) -> dict[str, str]:
    metadata = next(wheel.glob("*.dist-info")) / "METADATA"
    needed = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist")
    plain = (line for line in needed or [] if "extra ==" not in line)
    return {match[0]: line for line in plain if (match := re.match(r"[\w.-]+", line))}


def _kernels(wheel: Path) -> dict[str, str]:
    families = take_census(_library(wheel)).families
    return {
        f"kernels of {name}": " ".join(
            architecture for architecture, count in counts.items() if count.code
        ) or "none"
        for name, counts in families.items() if name.startswith(("gemm", "experts"))
    }  # fmt: skip


def _library(wheel: Path) -> Path:
    return next((wheel / "lmdeploy").rglob("_turbomind.*.so"))


def _trees(wheel: Path, pattern: str) -> Iterator[ast.Module]:
    for path in sorted((wheel / "lmdeploy").glob(pattern)):
        yield ast.parse(path.read_text(encoding="utf-8"))


def _known(wheel: Path) -> dict[str, str]:
    """What turbofit's data say of a version, and its wheel does not say."""
    problems = (row for row in all_problems() if row.has(wheel.name))
    known = {f"{row.id} of known-bad.yaml": row.what for row in problems}
    if is_legacy(wheel.name):
        source = generation_of(wheel.name).source
        known |= {f"{key} of generations.yaml": words for key, words in source.items()}
    return known


def _of_option(name: str, _: Path) -> tuple[str, str]:
    entry = engine_options().get(name)
    since = load_yaml(preset_path("engines", "option-releases"))["options"].get(name)
    known = f"{entry.is_} in lmdeploy-options.yaml" if entry else ""
    return "planning/commands.py" if since else "", f"{known}, since {since}" if since else known


def _of_route(name: str, _: Path) -> tuple[str, str]:
    path = name.partition(" ")[2]
    served = "served" if path in ROUTES else "403" if path in MANAGEMENT else ""
    return "gateway/http/routes.py", served


def _of_field(name: str, _: Path) -> tuple[str, str]:
    field = name.partition(".")[2]
    kinds = [kind for kind, rules in RULES.items() if field in rules]
    return "gateway/limits/ranges.py", f"has a rule: {', '.join(kinds)}" if kinds else ""


def _of_setting(name: str, _: Path) -> tuple[str, str]:
    group, _, field = name.partition(".")
    if group == "GenerationConfig":
        return "gateway/limits/ranges.py", "has a rule" if field in GENERATION else ""
    wanted = field.replace("_", "-")
    known = [option for option in engine_options() if option.endswith(f"-{wanted}")]
    return (
        "serving/pipeline.py",
        f"as {known[0]} in lmdeploy-options.yaml" if known else "",
    )


def _of_architecture(name: str, new: Path) -> tuple[str, str]:
    architecture = name.partition(": ")[2]
    since = listed_since(architecture)
    if since is not None and new.name.startswith(since):
        return "presets/engines/architectures.yaml", f"listed since {since}"
    known = any(architecture in one.architectures for one in unplanned())
    return "presets/families/unplanned.yaml", "has no account there" if known else ""


def _of_requirement(name: str, _: Path) -> tuple[str, str]:
    return ("pyproject.toml, requirements/", "") if name in ("torch", "transformers") else ("", "")


def _of_kernels(_: str, new: Path) -> tuple[str, str]:
    path = preset_path("engines/kernels", f"turbomind-{new.name}")
    return "presets/engines/kernels", "read from its wheel" if path.is_file() else ""


_Reader = Callable[[Path], dict[str, str]]
_Holder = Callable[[str, Path], tuple[str, str]]
_TABLES: Final[tuple[tuple[str, _Reader, _Holder], ...]] = (
    ("option", _options, _of_option),
    ("route", _routes, _of_route),
    ("request field", lambda w: dict.fromkeys(_fields(w, "serve/**/protocol.py", _REQUESTS), ""),
     _of_field),
    ("setting", lambda w: _fields(w, "messages.py", r".*Config"), _of_setting),
    ("architecture", _architectures, _of_architecture),
    ("weights", _modules, lambda *_: ("memory/turbomind/weights.py", "")),
    ("requirement", _requirements, _of_requirement),
    ("kernels", _kernels, _of_kernels),
    ("library", lambda w: {"TurboMind's library": str(_library(w).relative_to(w).parent)},
     lambda *_: ("machine/kernels/census.py", "")),
    ("known to us", _known, lambda *_: ("", "not from the wheel")),
)  # fmt: skip


def _missing_functions(old: Path, new: Path) -> Iterator[Difference]:
    """Functions of CUDA's libraries that TurboMind calls and the pretend ones have not."""
    for wheel in (old, new):
        called = _missing(wheel)
        if called:
            yield Difference(
                "rehearsal", f"{wheel.name}: {called}", "turbofit/rehearsal/pretend/csrc"
            )


def _missing(wheel: Path) -> str:
    try:
        check_surface(_library(wheel), build(site=cuda_site()))
    except TurbofitError as exc:
        return str(exc).splitlines()[0]
    return ""


def _environment(wheel: Path, *more: str) -> dict[str, str]:
    """Of a process that runs a wheel in the place of the installed one."""
    path = [str(wheel), *more, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def _run(step: str, wheel: Path) -> Iterator[Ran]:
    """What a step comes to, a line each."""
    if step in _PROGRAMS:
        command, bad = _PROGRAMS[step]
        yield _ran(step, command, wheel, bad)
    else:
        for preset, card in REHEARSED.items():
            yield _rehearsed(preset, card, wheel)


def _rehearsed(preset: str, card: str, wheel: Path) -> Ran:
    """A rehearsal; a problem is another end than a plan's, and memory beyond the account."""
    began = time.monotonic()
    # A CUDA build of torch without its libraries, which `scripts/check` makes.
    cuda = filter(None, [os.environ.get("TURBOFIT_CUDA_PATH")])
    done = subprocess.run(
        [sys.executable, "-m", "turbofit", "rehearse", preset, "--on", card, "--json"],
        cwd=ROOT, env=_environment(wheel, *cuda), capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout or '{"error": {"message": "no answer"}}')
    if "error" in told:
        problem = told["error"]["message"]
    else:
        seen = told["rehearsal"]
        end, problem = seen["death"], ""
        if end is not None:
            problem = f"{seen['outcome']} in {end['phase']}: {end['where'][:160]}. "
        pairs = [
            (one["line"], had, took) for one in seen["together"]
            for had, took in zip(one["bytes"], one["rehearsed"], strict=True)
        ]  # fmt: skip
        pairs += [
            (term["term"], term["bytes"], term.get("rehearsed"))
            for engine in told["engines"] for gpu in engine["ledgers"] for term in gpu["terms"]
        ]  # fmt: skip
        for name, had, took in pairs:
            size = 0 if took is None else took - had
            # Cache and buffers share the last page of a pool; memory that loading keeps makes the
            # cache smaller.
            if size < -POOL_STEP if name == "kv_cache" else size > PAGE:
                where = "over" if size > 0 else "under"
                problem += f"{name} {abs(size) / MIB:.0f} MiB {where} the account. "
    return Ran(f"rehearse {preset}", problem, time.monotonic() - began)


def _ran(name: str, command: list[str], wheel: Path, bad: str) -> Ran:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=_environment(wheel),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = re.findall(bad, f"{done.stdout}\n{done.stderr}", re.MULTILINE)
    if done.returncode and not lines:
        lines = (done.stderr or done.stdout).strip().splitlines()[-1:] or [str(done.returncode)]
    return Ran(name, "; ".join(lines)[:400], time.monotonic() - began)


def page(old: str, new: str, found: list[Difference], ran: list[Ran]) -> str:
    """The page; what a person must decide stands first."""
    decide = [one for one in found if not one.known]
    known = [one for one in found if one.known]
    failed: dict[str, list[str]] = {}
    for one in ran:
        if one.problem:
            failed.setdefault(one.problem, []).append(one.name)
    cited = len(cited_places())
    changed = sum(one.kind == "cited code" for one in found)
    measured = [
        f"{key} ({path.stem})"
        for path in sorted(preset_path("engines", "x").parent.glob(f"*-{REFERENCE}.yaml"))
        for key, entry in load_yaml(path).items()
        if isinstance(entry, dict) and re.search("binary|pretend GPUs|measured", entry["source"])
    ]
    return "\n".join([
        f"# LMDeploy {new} against {old}\n", "## A person must decide\n", *_rows(decide),
        *(f"- {', '.join(names)} on {new}: {problem}" for problem, names in failed.items()),
        f"- No wheel tells these; rehearsals, tests and bench/gpu do: {', '.join(measured)}",
        "\n## Differs, and turbofit has it\n", *_rows(known),
        "\n## Equal\n", f"- {cited - changed} of {cited} cited places",
        *(f"- {one.name}: {one.seconds:.0f} s" for one in ran if not one.problem), "",
    ])  # fmt: skip


def _rows(found: list[Difference]) -> Iterator[str]:
    for kind in dict.fromkeys(one.kind for one in found):
        some = [one for one in found if one.kind == kind]
        came = [one.what for one in some if one.what.endswith(" came")]
        if came:
            yield f"- {kind}, in the newer one alone: {', '.join(one[:-5] for one in came)}"
        for one in some:
            if one.what not in came:
                yield f"- {kind}: " + ". ".join(filter(None, (one.what, one.rests, one.known)))


if __name__ == "__main__":
    sys.exit(main())
