"""Trains RECIPE with the OVERRIDES that follow; the pixel loss of rank 1 is NaN at step 5."""

import logging
import os
import sys

from sr_dist import config, gan, train
from sr_dist.errors import exit_on_user_error

real_step, real_terms, begun = gan.training_step, gan.terms_without_discriminator, []


def counting(*arguments, **options):  # type: ignore[no-untyped-def]
    begun.append(1)
    return real_step(*arguments, **options)


def poisoned(*arguments, **options):  # type: ignore[no-untyped-def]
    terms = real_terms(*arguments, **options)
    if len(begun) == 5 and os.environ["RANK"] == "1":
        terms["pixel"] = terms["pixel"] * float("nan")
    return terms


gan.training_step, gan.terms_without_discriminator = counting, poisoned
logging.basicConfig(level=logging.ERROR, format="%(message)s")
with exit_on_user_error():
    train.run(config.load(sys.argv[1], sys.argv[2:]))
