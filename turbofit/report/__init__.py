"""Turns plans, machines, runs and other documents into text and pages for people."""
