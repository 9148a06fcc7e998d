"""What the checkpoint is: folders, hub, presets; families in one file each."""
