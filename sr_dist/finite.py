"""Numbers that are not finite: noticed without waiting for the device, alike on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sr_dist import shard_reader, shards, storage
from sr_dist.distributed import Processes
from sr_dist.errors import UserError


class Nonfinite:
    """Counts the steps in which something was not finite; adding waits for nothing.

    `limit`: so many of them in a row are too many. `counts`: (3,) int64 on the device: such steps
    in the whole run, those in a row now, and the most in a row since this start. `first`: the step
    with which the first row of `limit` began, or until there is one, the newest row; -1 before.
    `earlier`: how many steps of that row lie before it, and before this start. Gradients are the
    same on all ranks, and so are these; `terms` are this rank's own losses of step `first`.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.earlier = torch.zeros_like(self.first)
        self.terms: dict[str, Tensor] = {}

    def restore(self, counts: Tensor) -> None:
        """Go on counting from a checkpoint's `counts`.

        A row that it stands in goes on, but what lies before is not judged again: other settings
        may have let it pass, and what was not finite then is not known any more.
        """
        self.counts = counts.to(self.counts.device) * self.counts.new_tensor([1, 1, 0])

    def add(self, scalars: Mapping[str, Tensor], step: int) -> None:
        lengths = [value for name, value in scalars.items() if name.startswith("gradient/")]
        bad = (~torch.isfinite(torch.stack(lengths)).all()).long()
        total, before, most = self.counts.unbind()
        in_a_row = (before + bad) * bad
        self.counts = torch.stack([total + bad, in_a_row, torch.maximum(most, in_a_row)])
        begins = (bad > 0) & ((before == 0) | (self.first < 0)) & (most < self.limit)
        self.first = torch.where(begins, step, self.first)
        self.earlier = torch.where(begins, before, self.earlier)
        for name, value in scalars.items():
            if name.startswith(("loss/", "gradient/")):
                held = self.terms.get(name, torch.zeros_like(begins))
                self.terms[name] = torch.where(begins, ~torch.isfinite(value), held)


def check_weights(modules: Mapping[str, nn.Module], step: int) -> None:
    """Before a checkpoint, so that none is ever saved that is not finite.

    Raises:
        UserError: on all ranks alike, since they hold the same weights.
    """
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{name}.{key} is not finite at step {step}. Run again to go on from the last "
                    "checkpoint, with a lower learning rate or without mixed precision."
                )


def check_updates(
    nonfinite: Nonfinite,
    processes: Processes,
    index: shards.Index,
    plan: shards.Plan,
    reading: storage.Settings,
    place_of_step_0: int,
) -> int:
    """How many updates were left out so far because they were not finite.

    `place_of_step_0`: what to add to a step to find it in the plan.

    Raises:
        UserError: on all ranks alike, if there were too many in a row, with the step, the terms of
            the loss and the samples that were the first of them.
    """
    total, _, most = nonfinite.counts.tolist()
    if most < nonfinite.limit:
        return int(total)
    step = int(nonfinite.first)
    names = sorted(nonfinite.terms)
    table = torch.zeros(processes.world_size, len(names), device=processes.device)
    table[processes.rank] = torch.stack([nonfinite.terms[name] for name in names]).float()
    causes = []
    per_rank = plan.global_batch_size // processes.world_size
    samples = _names(index, plan, place_of_step_0 + step - 1, reading)
    for rank, flags in enumerate(processes.sum(table).bool().tolist()):
        terms = [n for n, bad in zip(names, flags, strict=True) if bad and n.startswith("loss/")]
        if terms:
            its = ", ".join(samples[rank * per_rank :][:per_rank])
            causes.append(f"{', '.join(terms)} of rank {rank}, on samples {its}")
    row, earlier = nonfinite.limit, int(nonfinite.earlier)
    found = "not finite"
    if row > 1:
        found = f"{row} steps in a row were not finite, the first"
        found += f" at step {step - earlier}, the first since this start" if earlier else ""
    raise UserError(
        f"{found} at step {step}: {'; '.join(causes) or 'a gradient, though no loss'}. No weight "
        "was touched. Run again to go on from the last checkpoint, with a lower learning rate, "
        "without mixed precision, or with train.on_nonfinite=skip."
    )


def _names(
    index: shards.Index, plan: shards.Plan, step: int, reading: storage.Settings
) -> list[str]:
    """`shard/key` of every row of global step `step`, from 0; reads the shards.

    Those of the plan: what took the place of one that was skipped is the next of its window.
    """
    names = []
    for shard, sample, _ in shards.samples_of_step(plan, step):
        try:
            key = next(shard_reader.read_range(index, shard, sample, sample + 1, reading)).key
        except shard_reader.UnreadableShard:
            key = ""
        names.append(f"{index.shards[shard].name}/{key or f'number {sample}'}")
    return names
