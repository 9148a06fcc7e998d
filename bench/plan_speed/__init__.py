"""How long a plan takes, beside other tools."""
