"""What an image costs LMDeploy's process: in LMDeploy's own way, and in turbofit's."""
