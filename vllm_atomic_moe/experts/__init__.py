"""Experts in memory: packed rows, slots, and the op that computes them. Importable without vLLM."""
