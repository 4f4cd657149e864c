"""Feedback as files of other projects: read, written (`formats`), and compared (`consistency`, `win_rates`).

From outside, import `formats`, the comparisons, and `imported` (what reading a file yields).
"""
