"""Makes a checkpoint of 4 bits: what it takes, the program, and whether LMDeploy reads the result.

`needs` counts memory and disk, `scheme` says how weights are packed, `program` writes the program
for llm-compressor, `read` examines what the program wrote.
"""
