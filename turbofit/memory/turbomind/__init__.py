"""The memory account of TurboMind, for LMDeploy 0.18."""
