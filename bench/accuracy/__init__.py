"""How far off turbofit's forecasts are: public measurements against the accounts."""
