"""What must hold of plans over random presets, cards and options."""
