"""The memory account of LMDeploy's PyTorch engine."""
