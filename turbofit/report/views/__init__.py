"""Plans, machines, runs and rehearsals as documents."""
