"""Options: made of the fields that they fill, shared by commands, from variables and profiles."""
