"""What an evaluation computes: estimates with intervals, correlations, diversity.

From outside: `statistics`, `bootstrap`, `diversity`.
"""
