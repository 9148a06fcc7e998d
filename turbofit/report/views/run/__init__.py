"""Sections on what ran: rehearsals, servers, calibrations, loads, tuning."""
