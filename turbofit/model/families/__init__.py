"""Reads the dimensions and the image rules of model families, each in a file of its own."""
