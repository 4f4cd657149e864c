"""Reports on runs, for people: score tables, curves, states, times, forecasts.

Assets and the CLI may import any module.
"""
