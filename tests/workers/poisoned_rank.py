"""Trains RECIPE with the OVERRIDES that follow; the pixel loss of rank 1 is NaN at step 5."""

import logging
import os
import sys

from sr_dist import config, gan, train
from sr_dist.errors import exit_on_user_error

real, calls = gan.generator_terms, []


def poisoned(*arguments, **options):  # type: ignore[no-untyped-def]
    calls.append(1)
    terms = real(*arguments, **options)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        terms["pixel"] = terms["pixel"] * float("nan")
    return terms


gan.generator_terms = poisoned
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    train.run(config.load(sys.argv[1], sys.argv[2:]))
