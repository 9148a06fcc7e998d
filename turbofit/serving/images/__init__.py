"""Has LMDeploy's process prepare images on several threads, each image only once."""
