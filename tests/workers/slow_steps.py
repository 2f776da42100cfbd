"""Trains RECIPE with the OVERRIDES that follow, a tenth of a second a step, saying each step.

And before them that it builds its networks.
"""

import logging
import os
import sys
import time

from sr_dist import config, distributed, gan, train
from sr_dist.errors import exit_on_user_error

parent = os.getppid()
real = gan.training_step


def slow(*arguments, **options):  # type: ignore[no-untyped-def]
    scalars = real(*arguments, **options)
    # At once, since several ranks may write to one pipe.
    os.write(1, f"step {options['images_seen'] // options['images'] + 1}\n".encode())
    time.sleep(0.1)
    return scalars


def building(*arguments, **options):  # type: ignore[no-untyped-def]
    os.write(1, b"building\n")
    time.sleep(0.3)
    return real_build(*arguments, **options)


real_build = gan.build_networks
gan.build_networks = building
gan.training_step = slow
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    launcher = parent if distributed.launched_alone() else None
    train.run(config.load(sys.argv[1], sys.argv[2:]), launcher=launcher)
