"""Scoring samples: functions, models in a worker process, files.

From outside: `scoring`.
"""
