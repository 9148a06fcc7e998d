"""What a person at a terminal sees and presses: output, progress, Ctrl-C."""
