"""``python -m bench.golden``: does turbofit print the same documents as before?

Without an option, documents are made and compared with the committed figures and sentences.
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
from bench.golden.compare import Difference, differences, read_folder, shown, write_folder
from bench.golden.figures import ADDED, Figures, Moved, figures_of, moved, summarised
from bench.golden.kept import keep, read_figures, read_sentences
from bench.golden.render import workplace
from bench.golden.words import reworded, where

ROOT = Path(__file__).resolve().parents[2]
#: Lines on sentences that are printed.
_MOST_LINES = 100
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
    if args.renew and only:
        return _refused("--renew counts sentences of all groups", "leave --only out")
    cases = all_cases(only)
    begin = time.process_time()
    documents = made(cases)
    print(_counted(documents, time.process_time() - begin), file=sys.stderr)
    if args.write is not None:
        write_folder(args.write, cases, documents)
    if args.renew:
        keep(cases, documents)
    if args.against is not None:
        return _against(args, only, documents)
    if args.write is not None or args.renew:
        return 0
    lines = since_renewal(cases, documents, whole=not only, words=not args.figures)
    print("".join(f"{line}\n" for line in lines), end="")
    print(f"{len(documents):,} documents compared" + ("" if lines else ": nothing differs"))
    return 1 if lines else 0


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
    add("--renew", action="store_true", help="write what is committed: figures/ and sentences.txt")
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
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), where], check=True)
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
    old = {name: figures_of(text) for name, text in before.items()}
    found = _moved(old, documents)
    gone = [name for name in before if name not in documents]
    lines = [*summarised(found, diffs=20, lines=30), *_on_one_side(old, documents, gone)]
    print("".join(f"{line}\n" for line in lines), end="")
    both = sum(name in before for name in documents)
    grave = sum(any(one.kind != ADDED for one in figures) for figures in found.values())
    print(
        f"{both:,} documents compared: figures of {grave:,} differ, {len(found) - grave:,} "
        f"have new keys alone; {len(documents) - both:,} are new, {len(gone):,} gone"
    )
    return 1 if grave or gone else 0


def since_renewal(
    cases: Sequence[Case], documents: Mapping[str, str], *, whole: bool, words: bool = True
) -> list[str]:
    """Return lines on how documents differ from the committed figures and sentences.

    Of a part of the documents (not ``whole``), no document and no sentence is gone.
    """
    kept = read_figures(dict.fromkeys(case.group for case in cases))
    found = _moved(kept, documents)
    gone = [name for name in kept if whole and name not in documents]
    lines = list(summarised(found, diffs=20, lines=10)) if found else []
    lines += _on_one_side(kept, documents, gone)
    if words:
        of_words = [*reworded(read_sentences(), where(documents), whole=whole)]
        lines += of_words[:_MOST_LINES]
        if len(of_words) > _MOST_LINES:
            lines.append(f"… and {len(of_words) - _MOST_LINES:,} more lines on sentences")
    if lines:
        lines.append("--against COMMIT shows whole documents; --renew keeps what is meant")
    return lines


def _moved(before: Mapping[str, Figures], documents: Mapping[str, str]) -> dict[str, list[Moved]]:
    """Return the figures that differ, by the names of the documents that both sides have."""
    both = {name: text for name, text in documents.items() if name in before}
    found = {name: moved(before[name], figures_of(text)) for name, text in both.items()}
    return {name: figures for name, figures in found.items() if figures}


def _on_one_side(
    before: Mapping[str, Figures], documents: Mapping[str, str], gone: Sequence[str]
) -> list[str]:
    new = [f"only now: {name}" for name in documents if name not in before]
    return new + [f"gone: {name}" for name in gone]


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
