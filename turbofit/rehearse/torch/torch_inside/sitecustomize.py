"""Python finds this in every process of a rehearsal of a torch engine; see ``phase_recorder``."""

import os

if os.environ.get("TURBOFIT_REHEARSAL"):
    from turbofit.rehearse.torch.phase_recorder import start

    start(os.environ["TURBOFIT_REHEARSAL"])
