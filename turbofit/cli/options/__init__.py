"""Options: made from the fields that they fill; from variables and files."""
