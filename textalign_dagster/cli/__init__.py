"""The command line, ``textalign``: one module a group of commands.

Nothing imports this package but the console script, `main`.
"""
