"""How LMDeploy's process prepares images: on several threads, and each image once."""
