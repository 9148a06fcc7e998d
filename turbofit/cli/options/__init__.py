"""Makes options from the fields that they fill; reads them from variables and files."""
