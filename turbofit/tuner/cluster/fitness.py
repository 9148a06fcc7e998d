"""Which nodes can be planned for at all, before any memory is counted."""

from __future__ import annotations

from turbofit.core.cluster import Node
from turbofit.core.version import __version__
from turbofit.memory.versions import REFERENCE, release

__all__ = ["why_unusable"]


def why_unusable(node: Node) -> str:
    """Why a node cannot be planned for; empty where it can.

    A version that is not told is not held against a node: snapshots and SPECs have none.
    """
    if node.machine is None:
        return node.why_not or "it was not measured"
    if not node.machine.visible:
        return node.why_not or "it has no GPU that may be used"
    if node.turbofit and node.turbofit != __version__:
        return (
            f"it has turbofit {node.turbofit}, this one is {__version__}: its memory would be"
            " measured and its engines be started by other rules"
        )
    if node.lmdeploy and release(node.lmdeploy) != release(REFERENCE):
        return f"it has LMDeploy {node.lmdeploy}, and plans are for {REFERENCE}"
    return node.why_not
