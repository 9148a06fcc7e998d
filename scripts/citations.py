"""What turbofit cites of other packages' code, and whether it still stands there.

    python -m scripts.citations [--renew] [--source FOLDER]

A citation is one form, on one line, beside the figure, range or formula that rests on it, in Python
and in YAML alike::

    lmdeploy lmdeploy/messages.py::GenerationConfig.__post_init__ #1a2b3c
    lmdeploy _turbomind.*.so `No enough gpu memory`
    lmdeploy 0.16.0 src/turbomind/memory/slab.h::Slab
    transformers 5.17.0 generation/stopping_criteria.py::StopStringCriteria.__init__ #5e6f7a

It names the package; the version that was read, which of LMDeploy is the one that plans are for
(`turbofit.core.version`) where none stands there; a file, by as much of the end of its path as no
other file of the package has; a function, class or variable in it; and a hash of that (docstrings,
comments, annotations and layout do not count), or in backquotes words that stand in it. LMDeploy's
C++ sources, ``src/``, are in no wheel and have no hash: without ``--source``, a checkout, the names
and words are looked for in the library.

Prints what is not as it was in the packages that are installed. ``--renew`` writes their versions
and the hashes that they have now: after somebody looked at what changed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import mmap
import re
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
_FORM: Final = re.compile(
    r"\b(lmdeploy|torch|transformers|triton) (?:(\d+\.\d[\w.]*) )?([\w*][\w./*-]*\.\w+)"
    r"(?:::([\w.]*\w))?(?: #([0-9a-f]{6})\b| `([^`\n]+)`)?"
)
_CPP: Final = "src/"

State = Literal["equal", "changed", "gone", "ambiguous", "unseen"]


class Citation(NamedTuple):
    """One citation and where it stands; ``digest`` and ``text`` are empty where it has none."""

    file: str
    line: int
    package: str
    version: str
    path: str
    name: str
    digest: str
    text: str

    @property
    def cited(self) -> str:
        """What is cited, as it is written, without version and hash."""
        named = f"{self.path}::{self.name}" if self.name else self.path
        return f"{named} `{self.text}`" if self.text else named


def citations(root: Path = ROOT) -> Iterator[Citation]:
    """Every citation of the package and of the presets, by file and line."""
    files = [*(root / "turbofit").rglob("*.py"), *(root / "presets").rglob("*.yaml")]
    for file in sorted(files):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for match in _FORM.finditer(line):
                package, version, path, name, digest, text = (word or "" for word in match.groups())
                if name or text:
                    where = str(file.relative_to(root))
                    yield Citation(where, number, package, version, path, name, digest, text)


def digest(node: ast.AST) -> str:
    """A hash of what a piece of Python does: no layout, no comment, no docstring, no annotation."""
    for child in ast.walk(node):
        if isinstance(child, ast.arg):
            child.annotation = None
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            child.returns = None
        elif isinstance(child, ast.AnnAssign):
            child.annotation = ast.Constant(None)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            child.value = ast.Constant(None)
    return hashlib.sha256(_written(node).encode()).hexdigest()[:6]


def _written(node: object) -> str:
    """A tree as `ast.dump` writes it, without empty fields, which Pythons differ in."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, one) for name, one in ast.iter_fields(node) if one is not None and one != []]
    return f"{type(node).__name__}({', '.join(f'{name}={_written(one)}' for name, one in fields)})"


def named(source: str, name: str) -> ast.AST | None:
    """The function, class or variable of this dotted name."""
    node: ast.AST | None = _parsed(source)
    for part in name.split("."):
        if node is not None:
            node = next((one for one in ast.walk(node) if part in _names(one)), None)
    return node


#: A file has several citations; who asks for a hash changes nothing that a name is found by.
_parsed: Final = cache(ast.parse)


def state(citation: Citation, package: Path, source: Path | None = None) -> State:
    """What became of a citation in a version of its package.

    Args:
        citation: what is looked for.
        package: the package's folder, e.g. ``site-packages/lmdeploy``.
        source: a checkout with the package's C++ sources.
    """
    path, words = citation.path, citation.text or citation.name.rpartition(".")[2]
    if path.startswith(_CPP) and source is None:
        path = "_turbomind.*.so"
    elif path.startswith(_CPP):
        package = source or package
    found = files_of(package, path)
    if len(found) != 1:
        return "ambiguous" if found else "gone"
    if found[0].suffix != ".py":
        if _holds(found[0], words.encode()):
            return "equal"
        return "unseen" if path != citation.path else "gone"
    text = found[0].read_text(encoding="utf-8")
    node = named(text, citation.name) if citation.name else None
    if node is None and citation.name:
        return "gone"
    if citation.text:
        whole = text if node is None else ast.get_source_segment(text, node)
        return "equal" if citation.text in (whole or "") else "changed"
    return "equal" if node is not None and digest(node) == citation.digest else "changed"


@cache
def files_of(package: Path, path: str) -> list[Path]:
    """The files of a package whose path ends so; it may begin with the package's own name."""
    return [one for one in _files(package) if one.match(path)]


@cache
def _files(package: Path) -> list[Path]:
    return list(package.parent.glob(f"{package.name}/**/*"))


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.citations", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--renew", action="store_true", help="write versions and hashes anew")
    parser.add_argument("--source", type=Path, help="a checkout with C++ sources")
    options = parser.parse_args(argv)
    bad = 0
    for one in citations():
        spec = importlib.util.find_spec(one.package)
        if spec is None or spec.origin is None:
            continue
        folder, installed = Path(spec.origin).parent, version(one.package).partition("+")[0]
        now = state(one, folder, options.source)
        if options.renew and now in ("equal", "changed") and not one.path.startswith(_CPP):
            _renew(one, folder, installed)
        elif now not in ("equal", "unseen"):
            bad += 1
            print(f"{one.file}:{one.line}: {one.package} {installed}: {one.cited}: {now}")
    return 1 if bad else 0


def _renew(citation: Citation, folder: Path, installed: str) -> None:
    path = ROOT / citation.file
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    line = lines[citation.line - 1]
    if citation.version:
        begin = f"{citation.package} {citation.version} {citation.path}"
        line = line.replace(begin, f"{citation.package} {installed} {citation.path}")
    if citation.digest or not citation.text:
        found = files_of(folder, citation.path)[0]
        node = named(found.read_text(encoding="utf-8"), citation.name)
        assert node is not None
        old = f"{citation.cited} #{citation.digest}" if citation.digest else citation.cited
        line = line.replace(old, f"{citation.cited} #{digest(node)}")
    lines[citation.line - 1] = line
    path.write_text("".join(lines), encoding="utf-8")


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


@cache
def _holds(path: Path, words: bytes) -> bool:
    """Whether a file has these bytes; read as it stands, since a library has 360 MB."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return held.find(words) >= 0


if __name__ == "__main__":
    sys.exit(main())
