"""From rows to batches: examples, batches, packed rows, new tokens.

From outside: used by `train` and `trainer`.
"""
