"""TurboMind's account, for LMDeploy 0.18."""
