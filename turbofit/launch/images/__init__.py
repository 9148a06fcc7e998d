"""How images are prepared in LMDeploy's process: on several threads, and not twice."""
