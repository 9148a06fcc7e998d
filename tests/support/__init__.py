"""What benches and tests share: processes, stand-ins for engines, plans, and a Ray cluster."""
