"""`turbofit batch` under kills, over a million lines, and beside plain clients."""
