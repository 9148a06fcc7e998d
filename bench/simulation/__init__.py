"""Does anything that must hold of a server break in simulated days full of faults?"""
