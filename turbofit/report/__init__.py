"""Makes text and pages for people from plans, machines, runs and other documents."""
