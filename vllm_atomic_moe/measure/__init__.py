"""Benchmarks of layers, servers and calibration; perplexity as served; plots."""
