"""On each rank, the layers whose gradients are made of factors, for so many rows.

With the argument "unlike", rank 1 multiplies matrices as other processors do.
"""

import json
import os
import sys

if sys.argv[1] == "unlike" and os.environ["RANK"] == "1":
    os.environ["MKL_CBWR"] = "COMPATIBLE"

import torch
from torch import nn

from sr_dist import distributed, ranks

with distributed.joined("no", seed=0) as processes:
    found = []
    for rows in (4, 128):
        module = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 1))
        found.append(ranks.factor(module, ranks.Factors(rows), processes.reductions))
    torch.distributed.barrier()
    print(json.dumps(found), flush=True)
