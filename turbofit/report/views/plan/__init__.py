"""Sections on plans: settings, ledger, what a machine holds, two plans beside each other."""
