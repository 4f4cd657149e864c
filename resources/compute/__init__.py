"""Where processes run: process trees of this machine, clients for Slurm and for pods of Kubernetes.

Below `workers` and `launchers`; from outside, import any module but `supervisor`.
"""
