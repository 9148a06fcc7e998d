"""Found by a child whose PYTHONPATH has this folder: puts the stand-in engine into LMDeploy."""

import standin_engine

standin_engine.install_hook()
