"""Feedback files of other projects: reading and writing (`formats`), comparing (`consistency`, `win_rates`).

Other packages import `formats`, the comparisons, and `imported` (the result of reading a file).
"""
