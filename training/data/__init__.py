"""From rows to batches: examples, batches, packed rows, new tokens.

From outside: by `train` and `trainer`.
"""
