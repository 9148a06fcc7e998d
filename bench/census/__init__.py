"""Which kernels do LMDeploy's wheels hold for which card?"""
