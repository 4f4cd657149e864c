"""``accelerate launch`` whose processes are forked (`tests.forked`): for tests of what several processes compute.

How they start and die is tested with the real command.
"""

import runpy

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests import forked

if __name__ == "__main__":
    subprocess_handler.Popen = forked.Popen  # type: ignore[misc]
    runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
