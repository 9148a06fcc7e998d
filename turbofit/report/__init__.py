"""Plans and machines as people read them."""
