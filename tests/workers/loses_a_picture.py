"""Trains RECIPE with OVERRIDES; PICTURE is damaged once the training begins.

loses_a_picture.py PICTURE RECIPE OVERRIDES…
"""

import logging
import sys
from pathlib import Path

from sr_dist import config, gan, train
from sr_dist.errors import exit_on_user_error

picture, recipe, *overrides = sys.argv[1:]
real = gan.training_step


def damaging(*arguments, **options):  # type: ignore[no-untyped-def]
    Path(picture).write_text("no picture")
    return real(*arguments, **options)


gan.training_step = damaging
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    train.run(config.load(recipe, overrides))
