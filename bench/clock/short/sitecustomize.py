"""Found by an engine whose PYTHONPATH has this folder: its answers end after so many tokens.

Pretend cards know no end of an answer, and some clients state none. `bench.clock.forms` sets the
variable.
"""

import os
import sys
from typing import Any

from turbofit.core.process.imports import After

MOST = int(os.environ.get("TURBOFIT_BENCH_ANSWER", "96"))


def _shorten(module: Any) -> None:
    """Have LMDeploy's engine end each answer after `MOST` tokens, whatever a request states."""
    say = module.say_no_answer

    def say_and_shorten(async_engine: Any) -> None:
        say(async_engine)
        run = async_engine.AsyncEngine.safe_run

        def safe_run(self: Any, handle: Any, session: Any, **keywords: Any) -> Any:
            config = keywords["gen_config"]
            config.max_new_tokens, config.ignore_eos = min(config.max_new_tokens, MOST), True
            return run(self, handle, session, **keywords)

        async_engine.AsyncEngine.safe_run = safe_run

    module.say_no_answer = say_and_shorten


sys.meta_path.insert(0, After("turbofit.rehearsal.no_answer", _shorten))
