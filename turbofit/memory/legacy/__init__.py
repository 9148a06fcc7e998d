"""LMDeploy's engines before 0.18: their generations are data, and each engine has one account."""
