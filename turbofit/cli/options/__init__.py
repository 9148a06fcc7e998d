"""Makes options from the fields that they set; reads options from variables and files."""
