"""Options: made from the fields that they fill; from commands, variables and profiles."""
