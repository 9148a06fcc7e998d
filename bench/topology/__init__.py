"""Published measurements of shapes against each other, and how the speed forecast ranks them."""
