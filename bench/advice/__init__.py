"""The advice that our users were given, computed."""
