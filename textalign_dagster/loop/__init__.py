"""The parts of the loop: the grid, its stages and their keys, the checks.

Assets and resources import it; what runs the loop is in `automation` and `cli.running`.
"""
