"""Rank 1 alone meets a mistake of the user; with an argument every rank.

If that is "early", before they are joined, and rank 0 long after the other.
"""

import os
import sys
import time

from sr_dist import distributed, signals
from sr_dist.errors import UserError, exit_on_user_error

if sys.argv[1:] == ["early"]:
    with exit_on_user_error(), signals.left_at_once("again"), distributed.said_once():
        time.sleep(3 * (os.environ["RANK"] == "0"))
        raise UserError("everywhere alike")
with exit_on_user_error(), distributed.joined("no", seed=0) as processes:
    if len(sys.argv) > 1:
        raise UserError("everywhere alike")
    if processes.rank == 1:
        raise UserError("only here")
    processes.wait_for_main("end")
