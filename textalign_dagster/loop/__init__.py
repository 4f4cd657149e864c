"""What the loop is made of: the grid, its stages and their keys, the checks.

Assets and resources import it; what runs the loop is in `runs`.
"""
