"""Trains a recipe, saving every 10 steps; rank 0 prints what came before what."""

import json
import sys

from sr_dist import checkpoint, config, distributed, train

order: list[str] = []
real_average, real_save = distributed.Processes.average_buffers, checkpoint.save


def average(self: distributed.Processes, *modules: object) -> None:
    order.append("average")
    real_average(self, *modules)  # type: ignore[arg-type]


def save(*arguments: object, **options: object) -> object:
    order.append("save")
    return real_save(*arguments, **options)  # type: ignore[arg-type]


distributed.Processes.average_buffers = average  # type: ignore[method-assign,assignment]
checkpoint.save = save  # type: ignore[assignment]
result = train.run(config.load(sys.argv[1], ["checkpoint.every_steps=10"]))
if result.means:
    print(json.dumps({"order": order}), flush=True)
