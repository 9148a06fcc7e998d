"""Descriptions of machines: from NVML, presets, snapshots or a SPEC, with cards and links."""
