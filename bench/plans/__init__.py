"""Properties that all plans must have, over random presets, cards and options."""
