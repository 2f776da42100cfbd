"""One training step: the discriminator's, then the generator's, on one forward of the generator."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sr_dist import graphs, losses, models, ranks, tensors
from sr_dist.distributed import Processes

Scalars = dict[str, Tensor]  # detached, on the device

# The averaged generator forgets its random start: its half-life is never more than this share of
# the images seen so far (Karras et al. 2022, EDM).
_EMA_RAMP = 0.05
_LEAST_SIDE = 32  # pixels that a discriminator needs


@dataclasses.dataclass(frozen=True)
class Objective:
    """What both networks minimise: terms and weights; a weight of 0 leaves the term out."""

    pixel: str
    pixel_weight: float
    content: nn.Module | None
    content_weight: float
    adversarial: str
    adversarial_weight: float | Tensor
    label_smoothing: float
    r1_weight: float
    total_variation: str
    total_variation_weight: float
    content_shift: int = 0
    shift: tuple[int, int] = (0, 0)  # of this step

    @property
    def is_adversarial(self) -> bool:
        """Whether that term is in; a weight that is a tensor is not looked at, and means so."""
        return isinstance(self.adversarial_weight, Tensor) or bool(self.adversarial_weight)

    def at(self, images_seen: int, *, warmup_images: int, ramp_images: int) -> Objective:
        """The objective after so many images.

        First the pixel loss alone; then all terms, the adversarial weight rising over
        `ramp_images`.
        """
        if images_seen < warmup_images:
            return dataclasses.replace(
                self, content_weight=0.0, adversarial_weight=0.0, total_variation_weight=0.0
            )
        share = min(1.0, (images_seen - warmup_images + 1) / max(1, ramp_images))
        chance = random.Random(images_seen)  # the same on all ranks, and after a restart
        return dataclasses.replace(
            self,
            adversarial_weight=share * self.adversarial_weight,
            shift=(chance.randint(0, self.content_shift), chance.randint(0, self.content_shift)),
        )


def build_objective(
    *,
    pixel: Mapping[str, Any],
    content: Mapping[str, Any],
    adversarial: Mapping[str, Any],
    total_variation: Mapping[str, Any],
    device: torch.device,
) -> Objective:
    """The objective from the settings of each term, as `config.Loss` names them.

    Raises:
        UserError: the content network's weights cannot be had.
    """
    network = None
    if content["weight"]:
        features = losses.content_features(
            content["network"], content["weights"], content["layers"]
        )
        network = losses.ContentLoss(
            features, normalize=content["normalize"], distance=content["distance"]
        )
        _to(network, device)
    return Objective(
        pixel=pixel["kind"],
        pixel_weight=pixel["weight"],
        content=network,
        content_weight=content["weight"],
        content_shift=content["shift"] if content["weight"] else 0,
        adversarial=adversarial["kind"],
        adversarial_weight=adversarial["weight"],
        label_smoothing=adversarial["label_smoothing"],
        r1_weight=adversarial["r1_weight"],
        total_variation=total_variation["kind"],
        total_variation_weight=total_variation["weight"],
    )


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a run, bare and as the ranks train them, with their optimisers."""

    generator: nn.Module
    wrapped_generator: nn.Module
    discriminator: nn.Module | None
    wrapped_discriminator: nn.Module | None
    optimizers: dict[str, torch.optim.Optimizer]  # by the name of what they train
    average: nn.Module  # of the generator; a plain copy where `half_life` is 0
    half_life: float  # images
    recorder: graphs.Recorder | None = None  # of steps; their gradients are then averaged here

    @property
    def weights(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by file name."""
        held = {"generator": self.generator}
        if self.discriminator is not None:
            held["discriminator"] = self.discriminator
        if self.half_life:
            held["ema"] = self.average
        return held

    def evaluated(self) -> nn.Module:
        """The generator that is measured and given away, in evaluation mode."""
        if not self.half_life:
            self.average.load_state_dict(self.generator.state_dict())
        return self.average


def build_networks(
    processes: Processes,
    *,
    generator: Mapping[str, Any],
    discriminator: Mapping[str, Any] | None,
    optimizer: Mapping[str, Mapping[str, Any]],
    half_life: float,
    sync_batchnorm: bool = False,
    compiled: bool = False,
    recorded: bool = False,
    factors: ranks.Factors | None = None,
) -> Networks:
    """`generator` and `discriminator`: arguments of `models.build_…`.

    `optimizer`: settings of each one's AdamW. `half_life`: of the averaged generator, in images; 0
    keeps none. `sync_batchnorm`: with the statistics of all ranks. `compiled`: by torch.compile.
    `recorded`: steps become CUDA graphs. `factors`: if those of a layer's gradient may be sent in
    its place, see `ranks.FactoredLinear`.
    """
    bare: dict[str, nn.Module] = {"generator": models.build_generator(**generator)}
    if discriminator is not None:
        bare["discriminator"] = models.build_discriminator(**discriminator)
    average = copy.deepcopy(bare["generator"]).requires_grad_(False).eval()
    _to(average, processes.device)
    wrapped, optimizers = {}, {}
    for name, module in bare.items():
        if sync_batchnorm and processes.world_size > 1:
            ranks.synchronise(module)
        _to(module, processes.device)
        factored = ranks.factor(module, factors, processes.reductions) if factors else []
        if compiled:
            # Both share code of accelerate's, and would be taken for one that varies in size.
            module.compile(dynamic=False)
        settings = optimizer[name]
        adamw = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=settings["learning_rate"],
            betas=(settings["beta1"], settings["beta2"]),
            weight_decay=settings["weight_decay"],
            fused=True,
        )
        wrapped[name], optimizers[name] = processes.wrap(
            module, adamw, reduces=not recorded, ignored=factored
        )
        if not recorded:
            channels = generator["channels"]
            processes.rehearse(wrapped[name], torch.zeros(1, channels, _LEAST_SIDE, _LEAST_SIDE))
    return Networks(
        generator=bare["generator"],
        wrapped_generator=wrapped["generator"],
        discriminator=bare.get("discriminator"),
        wrapped_discriminator=wrapped.get("discriminator"),
        optimizers=optimizers,
        average=average,
        half_life=half_life,
        recorder=graphs.Recorder(processes.device) if recorded else None,
    )


def training_step(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    lr: Tensor,
    hr: Tensor,
    *,
    images_seen: int,
    images: int,
    accumulation_steps: int = 1,
    keep_statistics: bool = False,
) -> Scalars:
    """Update everything once on `lr` (B, C, H, W) and `hr` (B, C, sH, sW), uint8 on any device.

    The discriminator learns where the objective has an adversarial weight. `images_seen`: before
    this step; `images`: in it, over all ranks. `accumulation_steps`: the batch is computed in so
    many parts, all of the discriminator's before all of the generator's. `keep_statistics`: put
    BatchNorm's back where the step made them other than finite. An update whose gradient is not
    finite is left out, on all ranks alike; `gradient/…`, its length, tells.
    """
    statistics = _Statistics(networks) if keep_statistics else None
    scalars: Scalars = {}
    for found in _sections(processes, networks, objective, lr, hr, accumulation_steps):
        if networks.recorder is not None:
            processes.average([gradient for _, gradient in found.of])
        length = processes.step(networks.optimizers[found.network])
        scalars |= {**found.scalars, f"gradient/{found.network}": length}
    if statistics is not None:
        statistics.mend()
    if networks.half_life:
        update_average(
            networks.average,
            networks.generator,
            half_life=networks.half_life,
            images_seen=images_seen,
            images=images,
        )
    return scalars


def _sections(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    lr: Tensor,
    hr: Tensor,
    accumulation_steps: int,
) -> Iterator[graphs.Gradients]:
    """`compute_gradients` as it is, or of a recording."""
    recorder = networks.recorder
    if recorder is None:
        return compute_gradients(processes, networks, objective, lr, hr, accumulation_steps)
    lr, hr = recorder.hold("lr", lr), recorder.hold("hr", hr)
    if objective.is_adversarial:
        weight = torch.full((), float(objective.adversarial_weight), device=processes.device)
        weight = recorder.hold("adversarial weight", weight)
        objective = dataclasses.replace(objective, adversarial_weight=weight)
    return recorder.play(
        (objective, lr.shape, hr.shape, accumulation_steps),
        1 + objective.is_adversarial,
        lambda: compute_gradients(processes, networks, objective, lr, hr, accumulation_steps),
    )


def compute_gradients(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    lr: Tensor,
    hr: Tensor,
    accumulation_steps: int = 1,
) -> Iterator[graphs.Gradients]:
    """The gradients of a step, see `training_step`: of the discriminator, if it learns; then, when
    that has been updated, of the generator.
    """
    lr, hr = (_on_device(batch, processes.device) for batch in (lr, hr))
    parts = list(zip(lr.chunk(accumulation_steps), hr.chunk(accumulation_steps), strict=True))
    sr = begun = None
    if len(parts) == 1:
        sr = networks.wrapped_generator(lr)  # the one forward that both use
    if objective.is_adversarial:
        assert networks.discriminator is not None
        scalars = discriminator_gradients(processes, networks, objective, parts, sr)
        # While ranks average those. The discriminator's update may change fp16's loss scale, which
        # must be one for all terms.
        if sr is not None and processes.mixed_precision != "fp16":
            begun = begin_generator(processes, objective, sr, hr)
        yield graphs.Gradients.found("discriminator", networks.discriminator, scalars)
    scalars = generator_gradients(processes, networks, objective, parts, sr, begun)
    yield graphs.Gradients.found("generator", networks.generator, scalars)


def relative_cost(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    *,
    shape: tuple[int, int, int, int],
    scale: int,
) -> float:
    """How many times as long a step takes under `objective` as under its pixel loss alone.

    Timed on copies of the networks and a made-up batch, without optimisers: nothing of the run is
    touched. `shape`: (N, C, H, W) of what this rank computes of HR at once.
    """
    generator = copy.deepcopy(networks.generator)
    discriminator = copy.deepcopy(networks.discriminator)
    hr = torch.linspace(0, 1, math.prod(shape), device=processes.device).view(shape)
    hr = hr.contiguous(memory_format=torch.channels_last)
    lr = hr[..., ::scale, ::scale].contiguous(memory_format=torch.channels_last)

    def synchronize() -> None:
        if processes.device.type == "cuda":
            torch.cuda.synchronize()

    def step(terms: Objective) -> float:
        """Seconds."""
        synchronize()
        began = time.perf_counter()
        with processes.autocast():
            sr = generator(lr)
        if terms.is_adversarial:
            assert discriminator is not None
            pictures = hr.detach().requires_grad_(bool(terms.r1_weight))
            with processes.autocast():
                real, fake = discriminator(pictures), discriminator(sr.detach())
            apart = losses.discriminator_adversarial(
                real.float(), fake.float(), terms.adversarial, terms.label_smoothing
            )
            if terms.r1_weight:
                apart = apart + losses.gradient_penalty(real, pictures)
            torch.autograd.backward(apart)
            processes.reductions.finish()
        found = generator_terms(processes, discriminator, terms, sr, hr)
        torch.autograd.backward(torch.stack(list(found.values())).sum())
        synchronize()
        return time.perf_counter() - began

    alone = objective.at(0, warmup_images=1, ramp_images=0)
    seconds = [(step(objective), step(alone)) for _ in range(3)]
    return min(whole for whole, _ in seconds) / min(pixel for _, pixel in seconds)


class _Statistics:
    """The floating-point buffers of the networks before a step."""

    def __init__(self, networks: Networks) -> None:
        trained = [m for m in (networks.generator, networks.discriminator) if m is not None]
        self.buffers = [b for m in trained for b in m.buffers() if b.is_floating_point()]
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def mend(self) -> None:
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(torch.isfinite(buffer).all(), buffer, before))


def discriminator_gradients(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    parts: Sequence[tuple[Tensor, Tensor]],
    sr: Tensor | None,
) -> Scalars:
    """The discriminator's on `parts` of (LR, HR), float in [0, 1].

    HR and SR pass in separate batches, each with its own BatchNorm statistics, and are
    back-propagated together. `sr`: the generator's output for the only part; None computes it.
    """
    discriminator, optimizer = networks.wrapped_discriminator, networks.optimizers["discriminator"]
    assert discriminator is not None
    optimizer.zero_grad(set_to_none=True)
    found = []
    for number, (lr, hr) in enumerate(parts):
        with torch.no_grad():
            fakes = networks.wrapped_generator(lr) if sr is None else sr.detach()
        with processes.reduced(discriminator, number == len(parts) - 1):
            hr = hr.detach().requires_grad_(bool(objective.r1_weight))
            _move_spectral_norms(discriminator, number == 0)
            real = discriminator(hr)
            _move_spectral_norms(discriminator, False)
            fake = discriminator(fakes)
            terms = {
                "discriminator": losses.discriminator_adversarial(
                    real, fake, objective.adversarial, objective.label_smoothing, ranks.mean_of_all
                )
            }
            if objective.r1_weight:
                terms["r1"] = objective.r1_weight * losses.gradient_penalty(real, hr)
            processes.backward(torch.stack(list(terms.values())).sum() / len(parts))
        scalars = {f"loss/{name}": term.detach() for name, term in terms.items()}
        scalars["score/hr"] = torch.sigmoid(real.detach()).mean()
        scalars["score/sr"] = torch.sigmoid(fake.detach()).mean()
        found.append(scalars)
    return _means(found)


def generator_gradients(
    processes: Processes,
    networks: Networks,
    objective: Objective,
    parts: Sequence[tuple[Tensor, Tensor]],
    sr: Tensor | None,
    begun: Begun | None = None,
) -> Scalars:
    """The generator's on `parts` of (LR, HR), against the frozen discriminator.

    `sr`: as for `discriminator_gradients`, with its graph. `begun`: by `begin_generator`, for it.
    """
    generator, optimizer = networks.wrapped_generator, networks.optimizers["generator"]
    optimizer.zero_grad(set_to_none=True)
    found = []
    for number, (lr, hr) in enumerate(parts):
        with processes.reduced(generator, number == len(parts) - 1):
            results = generator(lr) if sr is None else sr
            at_sr, terms = begun or begin_generator(processes, objective, results, hr, len(parts))
            if objective.is_adversarial:
                term = adversarial_term(processes, networks.discriminator, objective, at_sr, hr)
                processes.backward(term / len(parts))
                terms = terms | {"adversarial": term.detach()}
            results.backward(at_sr.grad)
        loss = torch.stack(list(terms.values())).sum()
        found.append({"loss/generator": loss, **{f"loss/{name}": terms[name] for name in terms}})
    return _means(found)


class Begun(NamedTuple):
    """The generator's loss in part, back-propagated to SR."""

    at_sr: Tensor  # SR without its graph, with a gradient
    terms: Scalars  # detached


def begin_generator(
    processes: Processes, objective: Objective, sr: Tensor, hr: Tensor, parts: int = 1
) -> Begun:
    """Back-propagate the terms without the discriminator, of one of so many parts of a batch."""
    at_sr = sr.detach().requires_grad_()
    terms = terms_without_discriminator(processes, objective, at_sr, hr)
    if terms:
        processes.backward(torch.stack(list(terms.values())).sum() / parts)
    return Begun(at_sr, {name: term.detach() for name, term in terms.items()})


def generator_terms(
    processes: Processes,
    discriminator: nn.Module | None,
    objective: Objective,
    sr: Tensor,
    hr: Tensor,
) -> Scalars:
    """The weighted terms of the generator's loss for its output `sr` and `hr`, float in [0, 1]."""
    terms = terms_without_discriminator(processes, objective, sr, hr)
    if objective.is_adversarial:
        terms["adversarial"] = adversarial_term(processes, discriminator, objective, sr, hr)
    return terms


def terms_without_discriminator(
    processes: Processes, objective: Objective, sr: Tensor, hr: Tensor
) -> Scalars:
    """The pixel, content and total variation terms of `generator_terms`."""
    terms: Scalars = {}
    if objective.pixel_weight:
        terms["pixel"] = objective.pixel_weight * losses.pixel_loss(objective.pixel)(sr, hr)
    if objective.content_weight:
        assert objective.content is not None
        with processes.autocast():
            down, right = objective.shift
            shifted = (batch[..., down:, right:] for batch in (sr, hr))
            terms["content"] = objective.content_weight * objective.content(*shifted)
    if objective.total_variation_weight:
        terms["total_variation"] = objective.total_variation_weight * losses.total_variation(
            sr, objective.total_variation
        )
    return terms


def adversarial_term(
    processes: Processes,
    discriminator: nn.Module | None,
    objective: Objective,
    sr: Tensor,
    hr: Tensor,
) -> Tensor:
    """The weighted adversarial term of `generator_terms`.

    `discriminator`: the bare module, not DistributedDataParallel: its parameters get no gradient,
    so there is nothing to reduce.
    """
    assert discriminator is not None
    discriminator.requires_grad_(False)
    with processes.autocast():
        fake, real = discriminator(sr), None
        if objective.adversarial == "relativistic_average":
            real = discriminator(hr).detach().float()
    discriminator.requires_grad_(True)
    value = losses.generator_adversarial(
        fake.float(), objective.adversarial, real, ranks.mean_of_all
    )
    return objective.adversarial_weight * value


def _move_spectral_norms(discriminator: nn.Module, move: bool) -> None:
    """Whether the forwards that follow improve the estimates of its spectral norms.

    Once a step, so that real and fake, and all parts of a batch, meet the same weights.
    """
    for module in discriminator.modules():
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            module.train(move)


def _means(parts: Sequence[Scalars]) -> Scalars:
    """The mean of each scalar over the parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}


@torch.no_grad()
def update_average(
    average: nn.Module, generator: nn.Module, *, half_life: float, images_seen: int, images: int
) -> None:
    """Move `average`, BatchNorm statistics included, towards `generator` after `images` more."""
    half_life = min(half_life, max(images_seen, 1) * _EMA_RAMP)
    share = 1 - 0.5 ** (images / half_life)
    pairs = list(zip(average.state_dict().values(), generator.state_dict().values(), strict=True))
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    counts = [pair for pair in pairs if not pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], share)
    if counts:
        torch._foreach_copy_([a for a, _ in counts], [b for _, b in counts])


def learning_rate(settings: Mapping[str, Any], images_seen: int, total_images: int) -> float:
    """The learning rate after `images_seen`, from an optimiser's settings.

    `constant`; `cosine`: half a period, from the peak to 0 at `total_images`; `multistep`: times
    `gamma` at each of `milestones`.
    """
    peak: float = settings["learning_rate"]
    if settings["schedule"] == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / total_images)))
    if settings["schedule"] == "multistep":
        passed = sum(images_seen >= milestone for milestone in settings["milestones"])
        return float(peak * settings["gamma"] ** passed)
    return peak


def apply_settings(
    networks: Networks,
    settings: Mapping[str, Mapping[str, Any]],
    images_seen: int,
    total_images: int,
) -> dict[str, float]:
    """Give every optimiser its `settings`, and the learning rate that they mean at `images_seen`.

    Settings may have changed since the checkpoint that the optimiser was read from. Returns the
    learning rates by name.
    """
    rates = {}
    for name, optimizer in networks.optimizers.items():
        its = settings[name]
        rates[name] = learning_rate(its, images_seen, total_images)
        for group in optimizer.param_groups:
            group["lr"] = rates[name]
            group["betas"] = (its["beta1"], its["beta2"])
            group["weight_decay"] = its["weight_decay"]
            group["clip_norm"] = its["clip_norm"]  # for Processes.step
    return rates


def _on_device(batch: Tensor, device: torch.device) -> Tensor:
    return tensors.to_float(batch.to(device, non_blocking=True))


def _to(module: nn.Module, device: torch.device) -> None:
    module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
