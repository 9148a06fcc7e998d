"""How long `turbofit which` takes, and whether it says what `turbofit plan` says."""
