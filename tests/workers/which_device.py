"""Each rank says where it computes, on a machine that pretends to have GPUs."""

import torch

from sr_dist import distributed

torch.cuda.is_available = lambda: True

with distributed.joined(None, seed=0) as processes:
    print(f"rank {processes.rank} of {processes.world_size}: {processes.device.type}", flush=True)
