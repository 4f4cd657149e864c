"""The command line, ``textalign``: one module per group of commands.

Only the console script, `main`, imports this package.
"""
