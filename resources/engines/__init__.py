"""What samples: the protocol (`sampler`), chunks that survive a crash, and one package an engine.

From outside: `sampler`, `chunks`, and each engine's `sampler`.
"""
