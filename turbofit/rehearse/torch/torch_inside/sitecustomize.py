"""Python finds this in every process of a rehearsal of a torch engine; see ``torch_clerk``."""

import os

if os.environ.get("TURBOFIT_REHEARSAL"):
    from turbofit.rehearse.torch.torch_clerk import start

    start(os.environ["TURBOFIT_REHEARSAL"])
