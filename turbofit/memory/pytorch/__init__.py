"""The account of LMDeploy's PyTorch engine."""
