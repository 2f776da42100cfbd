"""Trains RECIPE with the OVERRIDES that follow, a tenth of a second a step, saying each step."""

import logging
import os
import sys
import time

from sr_dist import config, gan, train
from sr_dist.errors import exit_on_user_error

real = gan.training_step


def slow(*arguments, **options):  # type: ignore[no-untyped-def]
    scalars = real(*arguments, **options)
    # At once, since several ranks may write to one pipe.
    os.write(1, f"step {options['images_seen'] // options['images'] + 1}\n".encode())
    time.sleep(0.1)
    return scalars


gan.training_step = slow
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    train.run(config.load(sys.argv[1], sys.argv[2:]))
