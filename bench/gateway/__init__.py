"""Costs and holes of the gateway, measured."""
