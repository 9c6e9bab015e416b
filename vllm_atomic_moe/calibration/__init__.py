"""Calibration: a model and text become statistics.

`text` cuts text into windows, `experts` watches the experts while the model runs, `collect` is the
run from beginning to end and returns the `Statistics` of `files/statistics.py`. Only `experts` and
`collect` import transformers; nothing here imports vllm.
"""
