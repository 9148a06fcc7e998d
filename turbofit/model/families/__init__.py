"""Reads the dimensions and the image rules of model families; each family has a file."""
