"""``python -m bench.golden``: does turbofit still print what it printed before?

Without an option, documents are made and compared with the committed hashes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.golden.cases import Case, all_cases, groups
from bench.golden.compare import (
    HASHES,
    Difference,
    differences,
    digest,
    read_folder,
    read_hashes,
    shown,
    write_folder,
    write_hashes,
)
from bench.golden.figures import ADDED, moved, summarised
from bench.golden.render import workplace

ROOT = Path(__file__).resolve().parents[2]
#: Makes documents of the turbofit in another checkout; cases and inputs stay ours.
_OF_CHECKOUT = """
import sys
ours, theirs = sys.argv[1:3]
sys.path.insert(0, ours)
from bench.golden.__main__ import main
assert "turbofit" not in sys.modules
sys.path.insert(0, theirs)
sys.exit(main(sys.argv[3:]))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; 0: nothing differs, 1: something does, 2: wrong use."""
    args = _parser().parse_args(argv)
    only = [name for name in args.only.split(",") if name]
    unknown = sorted(set(only) - set(groups()))
    if unknown:
        return _refused(f"no group is called {unknown[0]!r}", f"groups: {', '.join(groups())}")
    if args.figures and args.against is None:
        return _refused("--figures compares documents, and hashes are none", "give --against")
    cases = all_cases(only)
    begin = time.process_time()
    documents = made(cases)
    print(_counted(documents, time.process_time() - begin), file=sys.stderr)
    if args.write is not None:
        write_folder(args.write, cases, documents)
    if args.renew:
        kept = read_hashes() | {name: digest(text) for name, text in documents.items()}
        write_hashes({case.name: kept[case.name] for case in all_cases() if case.name in kept})
    if args.against is not None:
        return _against(args, only, documents)
    return 0 if args.write is not None or args.renew else _hashed(documents, whole=not only)


def made(cases: Sequence[Case]) -> dict[str, str]:
    """Make the documents of these cases; returns them by name."""
    with workplace() as place:
        return {case.name: place.document(case) for case in cases}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.golden", description=__doc__)
    add = parser.add_argument
    add("--against", metavar="WHERE", help="compare with a folder of documents, with the turbofit "
        "of another checkout, or with that of a commit")  # fmt: skip
    add("--write", type=Path, metavar="FOLDER", help="write the documents there")
    add("--renew", action="store_true", help="write the committed hashes")
    add("--only", default="", metavar="GROUPS", help=f"by commas: {','.join(groups())}")
    add("--figures", action="store_true", help="compare figures, and not words")
    return parser


def _against(args: argparse.Namespace, only: Sequence[str], documents: Mapping[str, str]) -> int:
    """Compare with the other side's documents, and say what differs."""
    try:
        with _folder(args.against) as where:
            before = _documents(where, only)
    except (OSError, subprocess.CalledProcessError) as exc:
        return _refused(f"{args.against} made no documents: {exc}", "see above")
    if not before:
        return _refused(f"{args.against} holds no documents", "write them with --write FOLDER")
    if args.figures:
        return _figures(before, documents)
    found = list(differences(before, documents))
    print("".join(f"{line}\n" for line in shown(found, diffs=20, lines=30)), end="")
    return _summary(found, len(documents))


@contextmanager
def _folder(where: str) -> Iterator[Path]:
    """Yield a folder as it is, or a checkout of a commit, which is removed afterwards."""
    if Path(where).exists():
        yield Path(where).resolve()
        return
    git = ("git", "-C", str(ROOT), "worktree")
    with tempfile.TemporaryDirectory(prefix="golden-commit-") as name:
        checkout = Path(name) / "checkout"
        words = [*git, "add", "--quiet", "--detach", str(checkout), where]
        subprocess.run(words, check=True)
        try:
            yield checkout
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=False)


def _documents(where: Path, only: Sequence[str]) -> dict[str, str]:
    """Read the documents in a folder, or make them with the turbofit of a checkout."""
    if not (where / "turbofit" / "__init__.py").is_file():
        return read_folder(where, only)
    with tempfile.TemporaryDirectory(prefix="golden-before-") as name:
        words = [sys.executable, "-c", _OF_CHECKOUT, str(ROOT), str(where), "--write", name]
        subprocess.run([*words, "--only", ",".join(only)], cwd=name, check=True)
        return read_folder(Path(name), only)


def _figures(before: Mapping[str, str], documents: Mapping[str, str]) -> int:
    """Print which figures differ; returns 1 if a figure changed or something is gone."""
    both = [name for name in documents if name in before]
    found = {name: moved(before[name], documents[name]) for name in both}
    found = {name: figures for name, figures in found.items() if figures}
    lines = list(summarised(found, diffs=20, lines=30))
    lines += [f"only now: {name}" for name in documents if name not in before]
    gone = [name for name in before if name not in documents]
    lines += [f"gone: {name}" for name in gone]
    print("".join(f"{line}\n" for line in lines), end="")
    grave = sum(any(one.kind != ADDED for one in figures) for figures in found.values())
    print(
        f"{len(both):,} documents compared: figures of {grave:,} differ, {len(found) - grave:,} "
        f"have new keys alone; {len(documents) - len(both):,} are new, {len(gone):,} gone"
    )
    return 1 if grave or gone else 0


def since_renewal(documents: Mapping[str, str]) -> str:
    """Return how documents differ from those of the committed hashes: figures, then words.

    The commit that last renewed the hashes makes the documents again. If git does not have it, as
    in a shallow clone, the text says so.
    """
    of_groups = sorted({case.group for case in all_cases() if case.name in documents})
    git = ("git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", str(HASHES))
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        with _folder(commit) as where:
            before = _documents(where, of_groups)
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"the commit that renewed the hashes makes no documents: {exc}"
    figures = {name: moved(before[name], documents[name]) for name in documents if name in before}
    found = {name: differ for name, differ in figures.items() if differ}
    lines = [f"since {commit[:8]} figures differ in {len(found)} of {len(documents)} documents:"]
    lines += summarised(found, diffs=20, lines=30)
    old, new = ({name: side[name] for name in figures} for side in (before, documents))
    return "\n".join(
        [*lines, "words and figures:", *shown(differences(old, new), diffs=5, lines=20)]
    )


def _hashed(documents: Mapping[str, str], *, whole: bool) -> int:
    """Compare with the committed hashes, which only show the names of documents that differ."""
    kept = read_hashes()
    now = {name: digest(text) for name, text in documents.items()}
    names = [*now, *(name for name in kept if whole and name not in now)]
    found = [Difference(name, ()) for name in names if kept.get(name) != now.get(name)]
    for one in found:
        state = "changed" if one.name in kept and one.name in now else "new or gone"
        print(f"{state}: {one.name}")
    if found:
        print("--against CHECKOUT shows the changes; --renew keeps them where they are meant")
    return _summary(found, len(documents))


def _summary(found: Sequence[Difference], count: int) -> int:
    print(f"{count:,} documents compared, {len(found):,} differ")
    return 1 if found else 0


def _counted(documents: Mapping[str, str], seconds: float) -> str:
    codes = Counter(re.findall(r"^exit code: (.+)$", "\n".join(documents.values()), re.MULTILINE))
    said = ", ".join(f"{count:,} with {code}" for code, count in sorted(codes.items()))
    return f"{len(documents):,} documents in {seconds:.0f} s of processor time; exit codes: {said}"


def _refused(cause: str, hint: str) -> int:
    print(f"error: {cause}\nhint: {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
