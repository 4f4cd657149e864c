"""Sampling: the protocol (`sampler`), chunks that survive a crash, and one package per engine.

From outside: `sampler`, `chunks`, and each engine's `sampler`.
"""
