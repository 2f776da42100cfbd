"""Rank 1 alone, or with an argument every rank, meets a mistake of the user."""

import sys

from sr_dist import distributed
from sr_dist.errors import UserError, exit_on_user_error

with exit_on_user_error(), distributed.joined("no", seed=0) as processes:
    if len(sys.argv) > 1:
        raise UserError("everywhere alike")
    if processes.rank == 1:
        raise UserError("only here")
    processes.wait_for_main("end")
