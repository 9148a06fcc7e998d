"""Python imports this file in each process of a torch engine's rehearsal.

The file starts `phase_recorder`.
"""

import os

if os.environ.get("TURBOFIT_REHEARSAL"):
    from turbofit.rehearsal.torch.phase_recorder import start

    start(os.environ["TURBOFIT_REHEARSAL"])
