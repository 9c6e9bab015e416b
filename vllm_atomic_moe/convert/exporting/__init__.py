"""Exporting: a checkpoint and a profile become a checkpoint that holds the profile's atoms only.

What an exported checkpoint looks like is said in `export_format.py`. `rows` reads experts in
whatever layout they are stored, `place` sees to the directory, `export` is the way from one to the
other. Nothing here imports vllm or transformers.
"""
