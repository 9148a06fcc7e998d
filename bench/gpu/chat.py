"""LMDeploy's command line where InternVL's chat models have no code of their own beside them.

Their checkpoints bring a config class and a tokenizer as Python files, which nothing made on the
spot has; both are stood in for here. Only `bench.gpu.trial` starts it, for such models.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Register, then hand over."""
    from lmdeploy.cli.entrypoint import run

    from turbofit.rehearse.turbomind.hfconfig import register_internvl

    register_internvl()
    sys.argv = ["lmdeploy", *sys.argv[1:]]
    run()


if __name__ == "__main__":
    main()
