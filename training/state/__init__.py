"""What a training reads and leaves: model folders, optimizer state, snapshots.

From outside: `snapshot_folder` (launchers; no torch); the rest by `train` and `trainer`.
"""
