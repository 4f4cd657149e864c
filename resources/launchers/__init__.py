"""Where a training runs: here (`launcher`), on Slurm, on Kubernetes; its Pipes messages.

From outside: `launcher`, `slurm`, `kubernetes`.
"""
