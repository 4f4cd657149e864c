"""What a person reads of a run: score tables, curves, states, times, forecasts.

Any module may be imported by assets and the CLI.
"""
