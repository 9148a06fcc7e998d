"""``python -m bench.rehearsal``: which programs this bench has."""

from __future__ import annotations

import sys

from bench.programs import show_programs

PROGRAMS = ("run", "planned")

if __name__ == "__main__":
    sys.exit(show_programs("rehearsal", PROGRAMS))
