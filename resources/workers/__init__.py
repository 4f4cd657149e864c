"""A process that works for a stage, wherever it runs: this machine, Slurm, Ray, a pod.

From outside: `channel` and `host` in stages' process, `serving` in the worker's.
"""
