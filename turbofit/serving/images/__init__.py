"""Has LMDeploy's process prepare images on several threads, and each image only once."""
