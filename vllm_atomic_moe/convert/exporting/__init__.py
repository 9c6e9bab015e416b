"""Export a checkpoint that holds the atoms of one profile only.

`files/export_format.py` describes an exported checkpoint. `rows` reads experts in any known layout,
`place` prepares the directory, `export` runs the conversion. Nothing here imports vllm or
transformers.
"""
