"""Where processes run: process trees on this machine, clients for Slurm and for Kubernetes pods.

A layer below `workers` and `launchers`; any module except `supervisor` may be imported.
"""
