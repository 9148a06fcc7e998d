"""What each kind of log means, and the arithmetic of what was missing."""
