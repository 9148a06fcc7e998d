"""What engines print, read by pure parsers; forecast against actual."""
