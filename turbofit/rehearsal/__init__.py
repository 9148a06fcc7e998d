"""Runs real engines on pretend machines, in children, and reads what they allocated."""
