"""Where no cluster is."""

from __future__ import annotations

import pytest

from turbofit.cli.serving.serve_cluster import ray_address
from turbofit.core.errors import UsageError

pytest.importorskip("ray")

from turbofit.launch.cluster.connect import connected


def test_ray_client_is_refused() -> None:
    """It is no node: engines could not be reached from it."""
    with pytest.raises(UsageError, match="Ray Client"), connected("ray://10.0.0.1:10001"):
        pass


def test_addresses() -> None:
    """``ray`` is the cluster of this host."""
    assert ray_address("ray") is None
    assert ray_address("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    with pytest.raises(UsageError, match="no Ray cluster"):
        ray_address("slurm")
