"""As rank 0 of 512, of which the others are pretended: what a training step would send.

Prints a JSON object: for each way of training the bytes that are reduced, the messages of them,
those under way while a part of the generator's loss is computed, and the trained parameters.
"""

import dataclasses
import json
import os
from typing import Any

import torch
from torch import distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

from sr_dist import config, distributed, gan, ranks

RANKS = 512
real_init = dist.init_process_group


def pretend(*arguments: Any, **options: Any) -> None:
    real_init(backend="fake", store=dist.HashStore(), rank=0, world_size=RANKS)


def trained(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def main(processes: distributed.Processes) -> None:
    sent: dict[str, int] = {"gradients": 0, "messages": 0, "factors": 0, "others": 0}

    names = ("all_reduce", "all_gather", "broadcast", "barrier", "reduce", "all_gather_object")
    for name in names:
        real = getattr(dist, name)

        def counted(*arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            if options.get("async_op"):  # of gradients
                sent["messages"] += 1
                sent["factors" if name == "all_gather" else "gradients"] += arguments[-1].nbytes
            else:
                sent["others"] += 1
            return real(*arguments, **options)

        setattr(dist, name, counted)

    terms_without_discriminator = gan.terms_without_discriminator

    def meanwhile(*arguments: Any) -> dict[str, torch.Tensor]:
        sent["meanwhile"] = len(processes.reductions._begun)
        return terms_without_discriminator(*arguments)

    gan.terms_without_discriminator = meanwhile
    found: dict[str, Any] = {"world_size": processes.world_size}
    for way, head, parts, weight in (
        ("linear", "linear", 1, 0.1),
        ("gap", "gap", 1, 0.1),
        ("gap in parts", "gap", 2, 0.1),
        ("warm-up", "gap", 1, 0.0),
        ("factors", "linear", 1, 0.1),
    ):
        adamw = dataclasses.asdict(config.AdamW(clip_norm=1.0))
        networks = gan.build_networks(
            processes,
            generator={"name": "swift_srgan", "scale": 4, "channels": 3},
            discriminator={"name": "swift_srgan", "channels": 3, "head": head},
            optimizer={"generator": adamw, "discriminator": adamw},
            half_life=10,
            factors=ranks.Factors(1) if way == "factors" else None,
        )
        objective = gan.build_objective(
            **dataclasses.asdict(
                config.Loss(
                    content=config.Content(weight=0.0),
                    adversarial=config.Adversarial(kind="bce", weight=weight),
                )
            ),
            device=processes.device,
        )
        hr = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        gan.apply_settings(networks, {n: adamw for n in networks.optimizers}, 0, 100)
        sent.update(gradients=0, messages=0, factors=0, others=0)
        gan.training_step(
            *(processes, networks, objective, hr[..., ::4, ::4].contiguous(), hr),
            images_seen=0,
            images=2 * RANKS,
            accumulation_steps=parts,
        )
        found[way] = dict(sent) | {
            "generator": trained(networks.generator),
            "discriminator": trained(networks.discriminator),
        }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    dist.init_process_group = pretend
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with distributed.joined("no", seed=0) as processes:
        main(processes)
        for rank in range(1, RANKS):
            processes.watch.tell(f"left {rank}")  # which those that there are would tell
