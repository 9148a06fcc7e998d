"""The cost of an image in LMDeploy's process: in LMDeploy's own way, and in turbofit's way."""
