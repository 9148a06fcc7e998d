"""The types of the contract, which every room uses; this room imports no other."""
