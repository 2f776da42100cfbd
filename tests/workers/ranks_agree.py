"""Trains three steps on other data on each rank; rank 0 prints what then differs between ranks.

The first argument is the compression of gradients.
"""

import dataclasses
import json
import sys

import torch

from sr_dist import config, distributed, gan, ranks

ADAMW = dataclasses.asdict(config.AdamW())


def differing(networks: gan.Networks, kind: str) -> list[str]:
    names = []
    for network, module in networks.weights.items():
        for name, tensor in getattr(module, f"named_{kind}")():
            largest, least = tensor.detach().clone().double(), tensor.detach().clone().double()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            if not torch.equal(largest, least):
                names.append(f"{network}.{name}")
    return names


def averaged_otherwise(processes: distributed.Processes, networks: gan.Networks) -> float:
    """How far `Processes.average` is from DistributedDataParallel, at most, on equal gradients."""
    random = torch.Generator().manual_seed(processes.rank)
    lr = torch.rand(2, 3, 8, 8, generator=random).to(processes.device)
    found = []
    for module in (networks.wrapped_generator, networks.generator):
        networks.generator.zero_grad()
        module(lr).square().mean().backward()
        processes.reductions.finish()
        trained = [p for p in networks.generator.parameters() if p.requires_grad]
        if module is networks.generator:
            processes.average([p.grad for p in trained if p.grad is not None])
        found.append([p.grad.clone() for p in trained if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 4
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def main(processes: distributed.Processes) -> None:
    networks = gan.build_networks(
        processes,
        generator={
            "name": "swift_srgan",
            "scale": 4,
            "channels": 3,
            "num_channels": 8,
            "num_blocks": 1,
        },
        discriminator={"name": "swift_srgan", "channels": 3, "head": "gap"},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=10,
        factors=ranks.Factors(2 * processes.world_size),
    )
    assert type(networks.discriminator.classifier[2]) is ranks.FactoredLinear  # type: ignore
    loss = config.Loss(
        content=config.Content(weight=0.0),
        adversarial=config.Adversarial(kind="bce", weight=0.1),
        total_variation=config.TotalVariation(weight=1e-3),
    )
    objective = gan.build_objective(**dataclasses.asdict(loss), device=processes.device)
    random = torch.Generator().manual_seed(processes.rank)
    for step in range(3):
        hr = torch.randint(256, (2, 3, 32, 32), generator=random, dtype=torch.uint8)
        lr = torch.randint(256, (2, 3, 8, 8), generator=random, dtype=torch.uint8)
        gan.training_step(processes, networks, objective, lr, hr, images_seen=4 * step, images=4)

    gradients = [
        parameter.grad
        for module in (networks.generator, networks.discriminator)
        for parameter in module.parameters()  # type: ignore[union-attr]
        if parameter.grad is not None
    ]
    found = {
        "gradients": len(gradients),
        "memories_of_gradients": len({g.untyped_storage().data_ptr() for g in gradients}),
        "world_size": torch.distributed.get_world_size(),
        "differing_buffers_before_averaging": differing(networks, "buffers"),
        "means": processes.means({"rank": torch.tensor(float(processes.rank))}),
    }
    with processes.averaged_buffers(networks.weights.values()):
        found |= {
            "differing_parameters": differing(networks, "parameters"),
            "differing_buffers": differing(networks, "buffers"),
        }
    found["differing_buffers_afterwards"] = differing(networks, "buffers")
    found["length"] = float(
        torch.cat([p.detach().flatten() for p in networks.generator.parameters()]).norm()
    )
    found["averaged_otherwise"] = averaged_otherwise(processes, networks)
    if processes.is_main:
        print(json.dumps(found), flush=True)


compression = sys.argv[1] if len(sys.argv) > 1 else "none"
with distributed.joined("no", seed=0, compression=compression) as processes:
    main(processes)
