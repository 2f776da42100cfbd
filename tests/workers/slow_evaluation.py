"""Trains RECIPE with OVERRIDES; the last rank that measures says so, and takes SECONDS more for it.

slow_evaluation.py SECONDS RECIPE OVERRIDES…
"""

import logging
import os
import sys
import time

from sr_dist import config, evaluate, train
from sr_dist.errors import exit_on_user_error

seconds, recipe, *overrides = sys.argv[1:]
real = evaluate.evaluate
slow = os.environ["RANK"] == "1" or "evaluation.ranks=all" not in overrides


def slowly(*arguments, **options):  # type: ignore[no-untyped-def]
    os.write(1, b"measures\n")
    time.sleep(float(seconds) * slow)
    return real(*arguments, **options)


evaluate.evaluate = slowly
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    train.run(config.load(recipe, overrides))
