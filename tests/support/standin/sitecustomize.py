"""Found by a child whose PYTHONPATH has this folder: puts the stand-in engine into LMDeploy.

In the place of LMDeploy's server on pretend GPUs runs the server without LMDeploy.
"""

import os
import sys
from pathlib import Path

import standin_engine

# The words after Python: the file that runs a module, and the module.
if sys.orig_argv[2:3] == ["turbofit.rehearsal.turbomind.server"]:
    server = str(Path(__file__).with_name("fake_server.py"))
    os.execv(sys.executable, [sys.executable, server, *sys.orig_argv[3:]])
standin_engine.install_hook()
