"""What a training reads and writes: model folders, optimizer state, snapshots.

From outside: `snapshot_folder` (launchers; no torch); the rest is used by `train` and `trainer`.
"""
