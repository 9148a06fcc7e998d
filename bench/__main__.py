"""``python -m bench``: the commands of all benches, each with its question, from the index."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_ROW = re.compile(r"^\| `(python -m bench\.[^`]*)` \| ([^|]*) \|", re.MULTILINE)


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench", description=__doc__).parse_args()
    for command, question in _ROW.findall(Path(__file__).with_name("README.md").read_text()):
        print(f"{command}\n    {question}")


if __name__ == "__main__":
    main()
