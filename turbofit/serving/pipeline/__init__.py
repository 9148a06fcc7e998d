"""``lmdeploy.pipeline`` with a plan."""
