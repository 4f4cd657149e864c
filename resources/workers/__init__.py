"""Worker processes of stages, wherever they run: this machine, Slurm, Ray, a pod.

From outside: `channel` and `host` in the stage's process, `serving` in the worker's.
"""
