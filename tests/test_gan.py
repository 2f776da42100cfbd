from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sr_dist import distributed, gan, losses, models
from sr_dist.distributed import Processes

ADAMW = {
    "learning_rate": 1e-3,
    "schedule": "constant",
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
}
OFF = {
    "pixel": {"kind": "mse", "weight": 0.0},
    "content": {"weights": "none", "normalize": True, "weight": 0.0},
    "adversarial": {"kind": "linear", "weight": 0.0},
    "total_variation": {"kind": "l1", "weight": 0.0},
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with distributed.joined("no", seed=0) as joined:
        yield joined


def build(processes: Processes, half_life: float = 0, global_skip: str = "none") -> gan.Networks:
    torch.manual_seed(0)
    return gan.build_networks(
        processes,
        generator={
            "name": "swift_srgan",
            "scale": 4,
            "channels": 3,
            "num_channels": 8,
            "num_blocks": 2,
            "global_skip": global_skip,
        },
        discriminator={"name": "swift_srgan", "channels": 3, "head": "gap"},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=half_life,
    )


def objective(processes: Processes, **changes: Mapping[str, Any]) -> gan.Objective:
    terms = {name: {**OFF[name], **changes.get(name, {})} for name in OFF}
    return gan.build_objective(**terms, device=processes.device)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    hr = torch.randint(256, (4, 3, 32, 32), generator=random, dtype=torch.uint8)
    return hr[..., ::4, ::4].contiguous(), hr


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "term",
    [
        {"pixel": {"kind": "mse", "weight": 1.0}},
        {"pixel": {"kind": "l1", "weight": 1.0}},
        {"content": {"weight": 1.0}},
        {"adversarial": {"kind": "linear", "weight": 1.0}},
        {"adversarial": {"kind": "bce", "weight": 1.0}},
        {"total_variation": {"kind": "l1", "weight": 1.0}},
        {"total_variation": {"kind": "l2", "weight": 1.0}},
    ],
    ids=lambda term: "-".join([*term, *(str(v.get("kind", "")) for v in term.values())]),
)
def test_each_term_alone_reaches_the_first_layer(
    processes: Processes, batch: tuple[Tensor, Tensor], term: dict[str, dict[str, Any]]
) -> None:
    networks = build(processes)
    sr = networks.generator(batch[0].float() / 255)
    scalars = gan.generator_step(
        processes,
        networks.optimizers["generator"],
        networks.discriminator,
        sr,
        batch[1].float() / 255,
        objective(processes, **term),
    )
    first = networks.generator.initial.cnn.depthwise.weight.grad  # type: ignore[union-attr]
    assert isinstance(first, Tensor) and first.abs().sum() > 0
    assert set(scalars) == {"loss/generator", f"loss/{next(iter(term))}"}
    assert networks.discriminator is not None and not grads(networks.discriminator)
    assert all(p.requires_grad for p in networks.discriminator.parameters())


def test_discriminator_step_touches_the_discriminator_alone_and_learns(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    networks = build(processes)
    assert networks.discriminator is not None
    before = copy.deepcopy(networks.generator.state_dict())
    hr = batch[1].float() / 255
    with torch.enable_grad():
        sr = networks.generator(batch[0].float() / 255)
    values = [
        gan.discriminator_step(
            processes, networks.discriminator, networks.optimizers["discriminator"], sr, hr, "bce"
        )
        for _ in range(15)
    ]
    assert not grads(networks.generator)
    for name, value in networks.generator.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name])
    assert values[-1]["loss/discriminator"] < 0.5 * values[0]["loss/discriminator"]
    assert values[-1]["score/hr"] > 0.7 > 0.3 > values[-1]["score/sr"]


def test_training_step_is_the_plain_mathematics(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    """Against the loop written out: the same update of both networks after one step."""
    networks = build(processes)
    assert networks.discriminator is not None
    generator, discriminator = copy.deepcopy((networks.generator, networks.discriminator))
    goal = objective(
        processes,
        pixel={"weight": 1.0},
        content={"weight": 0.006},
        adversarial={"weight": 0.5},
        total_variation={"weight": 0.1},
    )
    gan.training_step(processes, networks, goal, *batch, warming_up=False, images_seen=0, images=4)

    lr, hr = (part.float() / 255 for part in batch)
    trained = [p for p in generator.parameters() if p.requires_grad]
    optimizer_g = torch.optim.AdamW(trained, lr=1e-3)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    sr = generator(lr)
    real, fake = discriminator(hr), discriminator(sr.detach())
    (1 - real.sigmoid().mean() + fake.sigmoid().mean()).backward()
    optimizer_d.step()
    loss = (sr - hr).square().mean() + 0.5 * (1 - discriminator(sr).sigmoid()).mean()
    assert goal.content is not None
    loss = loss + 0.006 * goal.content(sr, hr) + 0.1 * losses.total_variation(sr, "l1")
    loss.backward()
    optimizer_g.step()

    for ours, plain in ((networks.generator, generator), (networks.discriminator, discriminator)):
        for (name, a), b in zip(
            ours.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)


def test_warming_up_is_the_pixel_loss_alone(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    networks = build(processes)
    assert networks.discriminator is not None
    before = copy.deepcopy(networks.discriminator.state_dict())
    goal = objective(processes, pixel={"weight": 1.0}, adversarial={"weight": 1.0})
    scalars = gan.training_step(
        processes, networks, goal, *batch, warming_up=True, images_seen=0, images=4
    )
    assert set(scalars) == {"loss/generator", "loss/pixel"}
    after = networks.discriminator.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_average_moves_half_way_in_a_half_life(processes: Processes) -> None:
    networks = build(processes, half_life=100)
    average, generator = networks.average, networks.generator
    for module, value in ((average, 1.0), (generator, 3.0)):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(value)
    for _ in range(10):
        gan.update_average(average, generator, half_life=100, images_seen=10**6, images=10)
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():  # BatchNorm's statistics too
            torch.testing.assert_close(tensor, torch.full_like(tensor, 2.0), msg=name)
    assert networks.evaluated() is average and set(networks.weights) == {
        "generator",
        "discriminator",
        "ema",
    }


def test_average_forgets_the_random_start(processes: Processes) -> None:
    networks = build(processes, half_life=1e9)
    before = copy.deepcopy(networks.average.state_dict())
    gan.update_average(networks.average, networks.generator, half_life=1e9, images_seen=0, images=8)
    networks.generator.final_conv.pointwise.weight.data.fill_(9.0)  # type: ignore[union-attr]
    gan.update_average(networks.average, networks.generator, half_life=1e9, images_seen=8, images=8)
    now = networks.average.state_dict()["final_conv.pointwise.weight"]
    assert (now - 9).abs().max() < 0.01 < (before["final_conv.pointwise.weight"] - 9).abs().min()


def test_without_average_the_generator_itself_is_evaluated(processes: Processes) -> None:
    networks = build(processes)
    networks.generator.final_conv.pointwise.weight.data.fill_(0.5)  # type: ignore[union-attr]
    evaluated = networks.evaluated()
    assert not evaluated.training and evaluated is not networks.generator
    assert torch.equal(
        evaluated.state_dict()["final_conv.pointwise.weight"],
        networks.generator.state_dict()["final_conv.pointwise.weight"],
    )
    assert "ema" not in networks.weights


def test_learning_rate_counts_images() -> None:
    assert gan.learning_rate(1e-3, "constant", 10**9, 100) == 1e-3
    values = [gan.learning_rate(1e-3, "cosine", seen, 100) for seen in (0, 50, 100, 200)]
    assert values == pytest.approx([1e-3, 5e-4, 0, 0])


def test_settings_reach_the_optimisers_also_after_a_restart(processes: Processes) -> None:
    networks = build(processes)
    settings = {
        "generator": {**ADAMW, "learning_rate": 1e-2, "schedule": "cosine", "beta1": 0.5},
        "discriminator": {**ADAMW, "learning_rate": 1e-4, "weight_decay": 0.3},
    }
    for optimizer in networks.optimizers.values():
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        optimizer.load_state_dict(optimizer.state_dict())
    rates = gan.apply_settings(networks, settings, 50, 100)
    assert rates == pytest.approx({"generator": 5e-3, "discriminator": 1e-4})
    for name, optimizer in networks.optimizers.items():
        (group,) = optimizer.param_groups
        assert group["lr"] == rates[name]
        assert group["betas"] == (settings[name]["beta1"], 0.999)
        assert group["weight_decay"] == settings[name]["weight_decay"]


class Watching(nn.Module):
    """A feature network that notes the precision it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        self.seen.append(out.dtype)
        return out


def test_content_network_computes_under_autocast_and_its_distance_in_float32(
    processes: Processes, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        distributed.Processes, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16)
    )
    networks, watching = build(processes), Watching()
    goal = dataclasses.replace(
        objective(processes),
        content=losses.ContentLoss(watching, normalize=False),
        content_weight=1.0,
    )
    sr = networks.generator(batch[0].float() / 255)
    scalars = gan.generator_step(
        processes, networks.optimizers["generator"], None, sr, batch[1].float() / 255, goal
    )
    assert watching.seen == [torch.bfloat16] * 2
    assert scalars["loss/content"].dtype == torch.float32


def test_published_output_is_not_rounded_by_mixed_precision() -> None:
    generator = models.build_generator(
        "swift_srgan", scale=4, channels=3, num_channels=8, num_blocks=1
    )
    with torch.autocast("cpu", torch.bfloat16):
        sr = generator(torch.rand(1, 3, 32, 32))
    assert sr.dtype == torch.float32 and len(sr.unique()) > 1000  # bfloat16 has 128 in [0.5, 1]


def test_content_form_is_the_configured_one(processes: Processes) -> None:
    for normalize in (True, False):
        content = objective(processes, content={"weight": 1.0, "normalize": normalize}).content
        assert isinstance(content, losses.ContentLoss) and content.normalize == normalize


def test_models_are_built_alike_by_seed(processes: Processes) -> None:
    one, other = build(processes), build(processes)
    for a, b in zip(one.generator.parameters(), other.generator.parameters(), strict=True):
        assert torch.equal(a, b)
    assert models.count_parameters(one.generator) > 0
