"""Goes on with a run on rank 0; rank 1 does not see its folder."""

import os
import sys

from sr_dist import config, train
from sr_dist.errors import exit_on_user_error

elsewhere = ["run.name=elsewhere"] if os.environ["RANK"] == "1" else []
with exit_on_user_error():
    train.run(config.load(sys.argv[1], elsewhere))
