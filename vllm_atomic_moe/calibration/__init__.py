"""Calibration: a model and text become statistics.

`data_paths` finds files, `documents` reads them, `text` cuts them into windows, `experts` watches
the experts while the model runs, `collect` is the run from beginning to end and returns the
`Statistics` of `files/statistics.py`. `streamed` is the same run one decoder layer at a time:
`layer_reader` reads a layer, `layer_calls` notes how the model calls it, `kept` holds its inputs.
`ranks` are processes that share a run. Nothing here imports vllm.
"""
