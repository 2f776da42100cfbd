from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import statistics
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sr_dist import config, distributed, gan, graphs, losses, models, ranks
from sr_dist.distributed import Processes
from sr_dist.errors import UserError
from sr_dist.models import unet

ADAMW = dataclasses.asdict(config.AdamW())
LOSS = dataclasses.asdict(config.Loss())
OFF = {name: {**settings, "weight": 0.0} for name, settings in LOSS.items()}
OFF["content"]["weights"] = "none"
KINDS = ("linear", "bce", "least_squares", "hinge", "relativistic_average")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with distributed.joined("no", seed=0) as joined:
        yield joined


@pytest.fixture(autouse=True)
def narrow_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers, in a third of the time."""
    monkeypatch.setattr(unet, "_WIDTH", 16)


def build(
    processes: Processes,
    half_life: float = 0,
    global_skip: str = "none",
    name: str = "swift_srgan",
    discriminator: str | None = "swift_srgan",
    norm: str = "batch",
    compiled: bool = False,
    factors: ranks.Factors | None = None,
) -> gan.Networks:
    torch.manual_seed(0)
    return gan.build_networks(
        processes,
        generator={
            "name": name,
            "norm": norm,
            "scale": 4,
            "channels": 3,
            "num_channels": 8,
            "num_blocks": 2,
            "global_skip": global_skip,
        },
        discriminator=discriminator and {"name": discriminator, "channels": 3, "head": "gap"},
        optimizer={"generator": ADAMW, "discriminator": ADAMW},
        half_life=half_life,
        compiled=compiled,
        factors=factors,
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


def parts(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0].float() / 255, batch[1].float() / 255)]


@pytest.mark.parametrize("generator", ["swift_srgan", "srgan"])
@pytest.mark.parametrize(
    "term",
    [
        {"pixel": {"kind": "mse", "weight": 1.0}},
        {"pixel": {"kind": "l1", "weight": 1.0}},
        {"pixel": {"kind": "charbonnier", "weight": 1.0}},
        {"content": {"weight": 1.0}},
        {"content": {"weight": 1.0, "network": "vgg19", "layers": ("conv2_2",)}},
        *({"adversarial": {"kind": kind, "weight": 1.0}} for kind in KINDS),
        {"total_variation": {"kind": "l1", "weight": 1.0}},
        {"total_variation": {"kind": "l2", "weight": 1.0}},
    ],
    ids=lambda term: "-".join(
        [*term, *(str(v.get("kind", v.get("network", ""))) for v in term.values())]
    ),
)
def test_each_term_alone_reaches_the_first_layer(
    processes: Processes,
    batch: tuple[Tensor, Tensor],
    term: dict[str, dict[str, Any]],
    generator: str,
) -> None:
    networks = build(processes, name=generator)
    scalars = gan.generator_gradients(
        processes, networks, objective(processes, **term), parts(batch), None
    )
    first = next(networks.generator.parameters()).grad
    assert isinstance(first, Tensor) and first.abs().sum() > 0
    assert set(scalars) == {"loss/generator", f"loss/{next(iter(term))}"}
    assert networks.discriminator is not None and not grads(networks.discriminator)
    assert all(p.requires_grad for p in networks.discriminator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_reaches_the_generator_through_the_unet(
    processes: Processes, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    networks = build(processes, discriminator="unet")
    goal = objective(processes, adversarial={"kind": kind, "weight": 1.0})
    gan.generator_gradients(processes, networks, goal, parts(batch), None)
    first = next(networks.generator.parameters()).grad
    assert isinstance(first, Tensor) and first.abs().sum() > 0
    assert networks.discriminator is not None and not grads(networks.discriminator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("discriminator", ["swift_srgan", "srgan", "unet"])
def test_its_gradients_touch_the_discriminator_alone_and_it_learns(
    processes: Processes, batch: tuple[Tensor, Tensor], kind: str, discriminator: str
) -> None:
    networks = build(processes, discriminator=discriminator)
    before = copy.deepcopy(networks.generator.state_dict())
    goal = objective(processes, adversarial={"kind": kind, "weight": 1.0})
    ((lr, _),) = parts(batch)
    sr = networks.generator(lr)
    settings = {name: {**ADAMW, "learning_rate": 1e-3} for name in networks.optimizers}
    gan.apply_settings(networks, settings, 0, 1)
    values = []
    for _ in range(12):
        values.append(gan.discriminator_gradients(processes, networks, goal, parts(batch), sr))
        processes.step(networks.optimizers["discriminator"])
    assert not grads(networks.generator)
    for name, value in networks.generator.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name])
    first, last = values[0], values[-1]
    assert last["loss/discriminator"] < first["loss/discriminator"] - 0.05
    assert last["score/hr"] - last["score/sr"] > first["score/hr"] - first["score/sr"]


def test_gradient_penalty_by_hand_and_in_the_step(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    hr = torch.rand(2, 3, 4, 4, requires_grad=True)
    weights = torch.rand(3, 4, 4)
    logits = (hr * weights).sum((1, 2, 3)).unsqueeze(1)  # its gradient at HR is `weights`
    penalty = losses.gradient_penalty(logits, hr)
    assert penalty.item() == pytest.approx(float(weights.square().sum()) / 2, rel=1e-5)
    networks = build(processes, discriminator="unet")
    goal = objective(processes, adversarial={"kind": "bce", "weight": 1.0, "r1_weight": 10.0})
    scalars = gan.training_step(processes, networks, goal, *batch, images_seen=0, images=4)
    assert scalars["loss/r1"] > 0
    assert all(torch.isfinite(g).all() for g in grads(networks.discriminator))  # type: ignore


@pytest.mark.parametrize("kind", ["bce", "least_squares", "relativistic_average"])
def test_the_discriminator_pays_what_the_settings_say(
    processes: Processes, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    """Its loss, R1 and their gradient, against the same computed by autograd alone."""
    settings = {"kind": kind, "weight": 1.0, "label_smoothing": 0.2, "r1_weight": 3000.0}
    networks = build(processes, discriminator="unet")
    goal = objective(processes, adversarial=settings)
    own = copy.deepcopy(networks.discriminator)
    assert own is not None and networks.discriminator is not None
    ((lr, hr),) = parts(batch)
    sr = networks.generator(lr).detach()
    scalars = gan.discriminator_gradients(processes, networks, goal, [(lr, hr)], sr)
    hr = hr.requires_grad_()
    gan._move_spectral_norms(own, True)
    real = own(hr)
    gan._move_spectral_norms(own, False)
    fake = own(sr)
    (slope,) = torch.autograd.grad(real.mean(dim=(1, 2, 3)).sum(), hr, create_graph=True)
    penalty = 3000.0 * slope.square().sum(dim=(1, 2, 3)).mean() / 2
    judged = losses.discriminator_adversarial(real, fake, kind, 0.2)
    assert judged.item() != losses.discriminator_adversarial(real, fake, kind, 0.0).item()
    (judged + penalty).backward()
    assert float(scalars["loss/discriminator"]) == pytest.approx(judged.item(), rel=1e-5)
    assert float(scalars["loss/r1"]) == pytest.approx(penalty.item(), rel=1e-4)
    for found, expected in zip(grads(networks.discriminator), grads(own), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    alone = copy.deepcopy(own)
    alone.zero_grad()
    losses.discriminator_adversarial(alone(hr), alone(sr), kind, 0.2).backward()
    changes = [(a - b).abs().max() for a, b in zip(grads(own), grads(alone), strict=True)]
    assert max(changes) > 1e-2, "R1 has a gradient of its own"


def test_what_all_losses_cost_is_known_beforehand_and_nothing_is_touched(
    processes: Processes,
) -> None:
    networks = build(processes)
    before = {name: copy.deepcopy(module.state_dict()) for name, module in networks.weights.items()}
    weighted = {name: {"weight": 1.0} for name in ("pixel", "content", "adversarial")}
    whole = objective(processes, **weighted)
    random_state = torch.get_rng_state()
    cost = gan.relative_cost(processes, networks, whole, shape=(2, 3, 64, 64), scale=4)
    pixel = whole.at(0, warmup_images=1, ramp_images=0)
    # Of three, since other tests are busy beside.
    alone = statistics.median(
        gan.relative_cost(processes, networks, pixel, shape=(2, 3, 64, 64), scale=4)
        for _ in range(3)
    )
    assert cost > 1.5 and 0.4 < alone < 2.5
    penalised = dataclasses.replace(whole, r1_weight=10.0)
    gan.relative_cost(processes, networks, penalised, shape=(2, 3, 64, 64), scale=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, module in networks.weights.items():
        assert all(p.grad is None for p in module.parameters())
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[name][key])


def test_pictures_are_shifted_before_the_content_network(processes: Processes) -> None:
    content = {"weights": "none", "layers": ("1",), "weight": 1.0, "shift": 8}
    goal = objective(processes, content=content, adversarial={"weight": 1.0})
    seen = [goal.at(images, warmup_images=0, ramp_images=0).shift for images in range(0, 6400, 16)]
    assert {down for down, _ in seen} == {right for _, right in seen} == set(range(9))
    assert seen[7] == goal.at(7 * 16, warmup_images=0, ramp_images=0).shift, "the same again"
    assert goal.at(0, warmup_images=1, ramp_images=0).shift == (0, 0)
    sr, hr = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    moved = dataclasses.replace(goal, shift=(3, 5), adversarial_weight=0.0)
    found = gan.generator_terms(processes, None, moved, sr, hr)["content"]
    assert goal.content is not None
    assert found == goal.content(sr[..., 3:, 5:], hr[..., 3:, 5:])
    assert found != goal.content(sr, hr)
    unused = objective(processes, content={"shift": 8})
    assert {unused.at(n, warmup_images=0, ramp_images=0).shift for n in range(9)} == {(0, 0)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_steps_are_the_plain_ones(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    goal = objective(processes, pixel={"kind": "l1", "weight": 1.0})
    states = []
    for compiled in (False, True):
        networks = build(processes, compiled=compiled, discriminator=None)
        for _ in range(2):
            gan.training_step(processes, networks, goal, *batch, images_seen=0, images=2)
        states.append(networks.generator.state_dict())
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_as_many_rows_are_tried_as_a_backward_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(ranks, "made_alike", lambda layer, rows: tried.append(rows))
    module = nn.Sequential(nn.Linear(24, 16))
    assert (
        ranks.factor(module, ranks.Factors(8, parts=4, cost=0.5), ranks.Reductions(4, "none")) == []
    )
    assert tried == [4], "of HR and of SR, in each of four parts"


def test_a_factored_layer_has_the_gradients_of_a_plain_one() -> None:
    """Of two forwards in one backward, and of another backward added to them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 16), nn.LeakyReLU(), nn.Linear(16, 1)).double()
    ours = copy.deepcopy(plain)
    assert ranks.factor(ours, ranks.Factors(10), ranks.Reductions(1, "none")) == []
    assert ranks.factor(ours, ranks.Factors(9, cost=2), ranks.Reductions(1, "none")) == []
    assert ranks.factor(ours, ranks.Factors(9), ranks.Reductions(1, "none")) == ["0.weight"]
    assert ours.state_dict().keys() == plain.state_dict().keys()
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(24, 16)))
    assert ranks.factor(normed, ranks.Factors(1), ranks.Reductions(1, "none")) == [], (
        "its weight is computed"
    )
    x = torch.ones(3, 24, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda _: 1 / 0)  # after the layer has added its rows
    with pytest.raises(ZeroDivisionError):
        ours(x).sum().backward()
    ours.zero_grad()
    found = []
    for module in (plain, ours):
        x = torch.linspace(-1, 1, 72, dtype=torch.float64).view(3, 24).requires_grad_()
        (module(x).square() + module(x.cos()).exp()).sum().backward()
        module(2 * x).sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    found, rows = [], torch.randn(8, 24)
    for module in (plain.float(), ours.float()):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(rows)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([p.grad for p in module.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-2 * float(theirs.abs().max()))
    ours.zero_grad()
    ours.requires_grad_(False)
    x = x.float()
    ours(x.detach().requires_grad_()).sum().backward()
    assert not grads(ours), "frozen, as in the generator's step"


@pytest.mark.parametrize("first", [RuntimeError("forbidden"), TypeError("other"), None])
def test_the_first_error_of_a_recording_is_told(
    first: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a recording that went wrong fails, too."""

    @contextlib.contextmanager
    def record(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("operation failed")

    monkeypatch.setattr(torch.cuda, "graph", record)
    recorder = graphs.Recorder.__new__(graphs.Recorder)
    recorder._pool = recorder._stream = None  # type: ignore[assignment]
    said = {"forbidden": r"cannot be recorded \(forbidden\)", "other": "^other$"}
    expected = said.get(str(first), r"cannot be recorded \(operation failed\)")
    kind = TypeError if isinstance(first, TypeError) else UserError
    with pytest.raises(kind, match=expected), recorder._recording(None):  # type: ignore[arg-type]
        if first is not None:
            raise first


def test_the_relativistic_generator_is_compared_with_hr(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    networks = build(processes, discriminator="unet")
    assert networks.discriminator is not None
    networks.discriminator.eval()  # its forwards change nothing
    goal = objective(processes, adversarial={"kind": "relativistic_average", "weight": 2.0})
    ((lr, hr),) = parts(batch)
    sr = networks.generator(lr)
    terms = gan.generator_terms(processes, networks.discriminator, goal, sr, hr)
    fake, real = networks.discriminator(sr), networks.discriminator(hr)
    one, zero = torch.ones_like(fake), torch.zeros_like(fake)
    entropy = nn.functional.binary_cross_entropy_with_logits
    expected = (entropy(fake - real.mean(), one) + entropy(real - fake.mean(), zero)) / 2
    assert float(terms["adversarial"].detach()) == pytest.approx(2 * expected.item(), rel=1e-5)


def test_settings_of_the_optimisers_can_change_on_the_way(processes: Processes) -> None:
    networks = build(processes)
    for clip, beta in ((1.0, 0.9), (0.5, 0.5), (None, 0.8)):
        settings = {n: {**ADAMW, "clip_norm": clip, "beta1": beta} for n in networks.optimizers}
        gan.apply_settings(networks, settings, 0, 1)
        for optimizer in networks.optimizers.values():
            (group,) = optimizer.param_groups
            assert (group["clip_norm"], group["betas"][0]) == (clip, beta)


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_parts_of_a_batch_add_up_to_it(
    processes: Processes, batch: tuple[Tensor, Tensor], accumulation_steps: int
) -> None:
    """Without BatchNorm (the U-Net has none), to float tolerance; several steps.

    AdamW divides by the gradient's length, so where that is nearly 0 its rounding shows: each step
    moves a weight by 1e-4, of which 1e-5 may differ in some and 1e-8 in the mean.
    """
    goal = objective(
        processes,
        pixel={"weight": 1.0},
        content={"weight": 0.1},
        adversarial={"kind": "bce", "weight": 0.1},
    )
    states, found = [], []
    for steps in (1, accumulation_steps):
        networks = build(processes, discriminator="unet", norm="none")
        settings = {name: {**ADAMW, "learning_rate": 1e-4} for name in networks.optimizers}
        gan.apply_settings(networks, settings, 0, 1)
        for _ in range(3):
            scalars = gan.training_step(
                *(processes, networks, goal, *batch),
                images_seen=0,
                images=4,
                accumulation_steps=steps,
            )
        states.append([m.state_dict() for m in (networks.generator, networks.discriminator)])  # type: ignore
        found.append(scalars)
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=1e-3), name
    for one, other in zip(*states, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=name)
            assert (other[name] - value).float().abs().mean() < 3e-8, name


def test_gradients_are_cut_to_the_set_length(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    networks = build(processes)
    settings = {name: {**ADAMW, "clip_norm": 1e-3} for name in networks.optimizers}
    gan.apply_settings(networks, settings, 0, 1)
    goal = objective(processes, pixel={"weight": 1.0}, adversarial={"weight": 1.0})
    scalars = gan.training_step(processes, networks, goal, *batch, images_seen=0, images=4)
    for module, name in (
        (networks.generator, "generator"),
        (networks.discriminator, "discriminator"),
    ):
        assert module is not None
        length = torch.stack([g.norm() for g in grads(module)]).norm()
        assert float(length) == pytest.approx(1e-3, rel=1e-3)
        assert scalars[f"gradient/{name}"] > 1e-3, "the length before"


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
    gan.training_step(processes, networks, goal, *batch, images_seen=0, images=4)

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
    whole = objective(processes, pixel={"weight": 1.0}, adversarial={"weight": 0.5})
    goal = whole.at(7, warmup_images=8, ramp_images=10)
    scalars = gan.training_step(processes, networks, goal, *batch, images_seen=0, images=4)
    assert set(scalars) == {"loss/generator", "loss/pixel", "gradient/generator"}
    after = networks.discriminator.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    weights = [
        whole.at(n, warmup_images=8, ramp_images=10).adversarial_weight for n in range(7, 20)
    ]
    assert weights == pytest.approx([0, *(0.05 * n for n in range(1, 11)), 0.5, 0.5])
    assert whole.at(0, warmup_images=0, ramp_images=0) == whole


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
    assert gan.learning_rate(ADAMW, 10**9, 100) == 1e-3
    cosine = {**ADAMW, "schedule": "cosine"}
    values = [gan.learning_rate(cosine, seen, 100) for seen in (0, 50, 100, 200)]
    assert values == pytest.approx([1e-3, 5e-4, 0, 0])
    steps = {**ADAMW, "schedule": "multistep", "milestones": (10, 30), "gamma": 0.5}
    values = [gan.learning_rate(steps, seen, 100) for seen in (0, 9, 10, 29, 30, 99)]
    assert values == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


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

    def forward(self, x: Tensor) -> list[Tensor]:
        out: Tensor = self.conv(x)
        self.seen.append(out.dtype)
        return [out]


def test_content_network_computes_under_autocast_and_its_distance_in_float32(
    processes: Processes, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        distributed.Processes, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16)
    )
    networks, watching = build(processes), Watching()
    goal = dataclasses.replace(
        objective(processes),
        content=losses.ContentLoss(watching, normalize=False, distance="mse"),
        content_weight=1.0,
    )
    scalars = gan.generator_gradients(processes, networks, goal, parts(batch), None)
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


def test_statistics_that_a_step_spoils_are_put_back(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    """The second block's output overflows, and all behind it; what lies before learns on."""

    def buffers(keep: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        networks = build(processes)
        found = networks.generator.residual[1].block1.cnn.pointwise.weight  # type: ignore
        found.data.fill_(1e38)
        before = {k: v.clone() for k, v in networks.generator.named_buffers()}
        pixel = objective(processes, pixel={"weight": 1.0})
        options = {"images_seen": 0, "images": 4, "keep_statistics": keep}
        scalars = gan.training_step(processes, networks, pixel, *batch, **options)
        assert not torch.isfinite(scalars["gradient/generator"])
        return before, dict(networks.generator.named_buffers())

    _, spoiled = buffers(keep=False)
    wrong = {name for name, value in spoiled.items() if not torch.isfinite(value).all()}
    spared = "residual.0.block2.bn.running_var"
    assert "residual.1.block1.bn.running_var" in wrong and spared not in wrong
    before, kept = buffers(keep=True)
    for name, value in kept.items():
        if name in wrong:
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, spoiled[name]), name
    assert not torch.equal(kept[spared], before[spared])


def test_a_loss_scale_that_the_discriminators_update_changes_is_that_of_all_terms(
    processes: Processes, batch: tuple[Tensor, Tensor]
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator = types.SimpleNamespace(
        scaler=scaler,
        backward=lambda loss: scaler.scale(loss).backward(),
        autocast=contextlib.nullcontext,
    )
    scaled = dataclasses.replace(processes, accelerator=accelerator, mixed_precision="fp16")
    goal = objective(processes, pixel={"weight": 1.0}, adversarial={"kind": "bce", "weight": 0.1})
    found = []
    for these in (processes, scaled):
        networks = build(processes)
        sections = gan.compute_gradients(these, networks, goal, *batch)
        next(sections)
        if these is scaled:
            scaler.update(2.0)  # as where the discriminator's gradient overflows
        next(sections)
        found.append(grads(networks.generator))
    for plain, doubled in zip(*found, strict=True):
        torch.testing.assert_close(doubled / 2, plain)


def test_the_state_of_a_gradient_scaler_is_kept(processes: Processes) -> None:
    """What fp16 has found of its loss scale: 2 ** 10, halved once, and one good step since."""

    def scaled(init_scale: float) -> Processes:
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        accelerator = types.SimpleNamespace(scaler=scaler)
        return dataclasses.replace(processes, accelerator=accelerator)

    one = scaled(1024.0)
    weight = torch.ones(1, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.1)
    scaler = one.accelerator.scaler
    for gradient in (torch.inf, 1.0):
        scaler.scale(weight).backward()
        weight.grad = torch.tensor([gradient])
        scaler.step(sgd)
        scaler.update()
    state = one.scaler_state()
    other = scaled(2.0**16)
    other.load_scaler_state(state)
    assert other.accelerator.scaler.get_scale() == 512.0
    assert other.scaler_state() == state and state["_growth_tracker"] == 1
    bare = dataclasses.replace(processes, accelerator=types.SimpleNamespace(scaler=None))
    bare.load_scaler_state(state)
    assert bare.scaler_state() == {}
