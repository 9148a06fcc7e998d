"""What the hardware is: NVML, links, presets, snapshots, SPEC."""
