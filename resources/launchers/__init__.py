"""Where training runs: on this machine (`launcher`), on Slurm, on Kubernetes; and its Pipes messages.

From outside: `launcher`, `slurm`, `kubernetes`.
"""
