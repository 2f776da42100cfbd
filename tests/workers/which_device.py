"""Each rank says where it computes, on a machine that pretends to have GPUs."""

import sys

import torch

from sr_dist import distributed

torch.cuda.is_available = lambda: True

with distributed.joined(None, seed=0) as processes:
    # One write for the whole line: print writes two, and another rank's may come between.
    sys.stdout.write(f"rank {processes.rank} of {processes.world_size}: {processes.device.type}\n")
