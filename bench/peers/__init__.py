"""turbofit beside LMDeploy and vLLM on the same pretend cards."""
