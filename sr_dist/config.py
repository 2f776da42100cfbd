"""The settings of a run: frozen dataclasses, read from YAML, written back as YAML.

Every problem of a configuration is reported in one `UserError`, each with its dotted key, what was
found, what was expected, and the nearest valid name. Only `launch/` and `train/` import this
module; everything else takes plain arguments.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from sr_dist import losses, models, settings, tiles
from sr_dist.errors import UserError
from sr_dist.settings import REQUIRED, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    name: str = setting("run", "names the run's folder inside output_dir")
    output_dir: str = setting("runs", "folder that holds the run folders", path=True)
    seed: int = setting(0, "seeds weights, sample order, crops and flips", minimum=0, maximum=2**63)
    resume: str = setting(
        "auto",
        "auto: go on from the run's newest whole checkpoint; never: refuse to; a checkpoint or a "
        "run's folder: a new run goes on from there, and a run goes back to one of its own",
        path=True,
    )
    processes: int | None = setting(
        None, "how many there must be; launchers may start fewer and not say so", minimum=1
    )
    timeout_minutes: float = setting(
        10.0, "without a sign of life after which a rank counts as lost and the run ends", above=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Degradation:
    blur_sigma: tuple[float, float] = setting(
        (0.0, 0.0),
        "Gaussian blur before downscaling, of training crops alone: range of its sigma, HR pixels",
        minimum=0,
    )
    noise_sigma: tuple[float, float] = setting(
        (0.0, 0.0), "Gaussian noise after downscaling: range of its sigma, levels of 255", minimum=0
    )
    jpeg_quality: tuple[int, int] = setting(
        (100, 100), "JPEG at the end: range of its quality; 100 is none", minimum=1, maximum=100
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    train: str = setting(
        REQUIRED,
        "training shards: a folder or address with index.json, an index.json, or a brace range "
        "beside one, shard-{000000..000099}.tar",
        path=True,
    )
    validation: str = setting(
        REQUIRED, "pictures to evaluate on: a folder, a .txt list of files, or shards", path=True
    )
    scale: int = setting(4, "enlargement of height and width", choices=(2, 4, 8))
    channels: int = setting(3, "3: RGB, 1: gray", choices=(1, 3))
    bits: int = setting(16, "significant bits of 16-bit gray pictures", minimum=9, maximum=16)
    crop_size: int = setting(96, "side of the HR training crop, pixels", minimum=16)
    crops_per_image: int = setting(4, "crops taken from one decoded tile per epoch", minimum=1)
    degradation: Degradation = dataclasses.field(default_factory=Degradation)
    decode: str = setting(
        "cpu",
        "cpu: pictures are decoded by the loader processes; nvjpeg: shards of JPEGs by the GPU",
        choices=("cpu", "nvjpeg"),
    )
    num_workers: int = setting(
        2, "loader processes per rank; 0 loads in the rank itself", minimum=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    on_error: str = setting(
        "stop",
        "a sample that cannot be used: stop ends the run and names it; skip takes another in its "
        "place and counts it (never for a fault of the network or the disk)",
        choices=("stop", "skip"),
    )
    attempts: int = setting(6, "to get a piece of a remote shard, in a row", minimum=1)
    timeout: float = setting(
        30.0, "to connect, and without a byte, seconds; over http(s) and s3", above=0
    )
    cache_dir: str | None = setting(
        None, "folder that keeps remote shards, so that later epochs read them there", path=True
    )
    cache_bytes: int = setting(
        50 * 10**9,
        "of the shards kept, beside those being fetched or read; the least recently used make room",
        minimum=1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    name: str = setting(
        "swift_srgan",
        "swift_srgan: depthwise-separable convolutions; srgan: SRResNet, with standard ones",
        choices=tuple(models.GENERATORS),
    )
    num_channels: int = setting(64, "width of the hidden layers", minimum=1)
    num_blocks: int = setting(16, "residual blocks", minimum=1)
    norm: str = setting("batch", "normalisation of the blocks", choices=("batch", "none"))
    global_skip: str = setting(
        "none",
        "none: as published; bicubic: the network adds its detail to the bicubic enlargement",
        choices=("none", "bicubic"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    name: str = setting(
        "swift_srgan",
        "swift_srgan, srgan: a score a picture, from separable or standard convolutions; unet: "
        "Real-ESRGAN's U-Net, a score a pixel",
        choices=tuple(models.DISCRIMINATORS),
    )
    head: str = setting(
        "linear",
        "linear: 6x6 pool and an 18.9 M weight layer, as published; gap: global average pool; the "
        "unet has none",
        choices=("linear", "gap"),
    )
    spectral_norm: bool = setting(
        False, "divide every layer's weights by their largest singular value; unet always does"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    generator: Generator = dataclasses.field(default_factory=Generator)
    discriminator: Discriminator = dataclasses.field(default_factory=Discriminator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixel:
    kind: str = setting("mse", "distance between SR and HR pixels", choices=losses.PIXEL)
    weight: float = setting(1.0, "weight in the generator's loss", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    network: str = setting(
        "mobilenet_v2",
        "feature network: mobilenet_v2 as published, vgg19 as SRGAN",
        choices=tuple(losses.CONTENT_NETWORKS),
    )
    layers: tuple[str, ...] = setting(
        (),
        "whose maps are compared, averaged: 0 to 18 of mobilenet_v2, conv1_1 to conv5_4 (before "
        "activation) of vgg19; none given: the last",
    )
    distance: str = setting("mse", "between feature maps", choices=losses.CONTENT_DISTANCES)
    weights: str = setting(
        "auto",
        "auto: torchvision's ImageNet weights (a download of 14 MB, or 548 MB for vgg19); a file "
        "with a state dict; none: random weights, for tests only",
        path=True,
    )
    normalize: bool = setting(True, "normalise pictures as ImageNet ones; false: as published")
    shift: int = setting(
        0,
        "pixels that pictures are shifted by at most before the network, at random in every step: "
        "its strides otherwise leave a grid in what is trained",
        minimum=0,
        maximum=16,
    )
    weight: float = setting(0.006, "weight in the generator's loss; 0 leaves it out", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial:
    kind: str = setting(
        "linear",
        "linear: 1 - sigmoid(D), as published; bce: non-saturating cross-entropy, as SRGAN; "
        "least_squares; hinge; relativistic_average, as ESRGAN",
        choices=losses.ADVERSARIAL,
    )
    label_smoothing: float = setting(
        0.0,
        "what D's target for HR falls short of 1; for bce, least_squares, relativistic_average",
        minimum=0,
        below=1,
    )
    r1_weight: float = setting(
        0.0, "weight of D's gradient penalty at HR (R1); doubles D's work", minimum=0
    )
    weight: float = setting(
        0.001, "weight in the generator's loss; 0 trains no discriminator", minimum=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation:
    kind: str = setting(
        "l1", "l1: absolute differences; l2: squared", choices=losses.TOTAL_VARIATION
    )
    weight: float = setting(2.0e-8, "weight in the generator's loss", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    pixel: Pixel = dataclasses.field(default_factory=Pixel)
    content: Content = dataclasses.field(default_factory=Content)
    adversarial: Adversarial = dataclasses.field(default_factory=Adversarial)
    total_variation: TotalVariation = dataclasses.field(default_factory=TotalVariation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    learning_rate: float = setting(1.0e-3, "peak learning rate", above=0)
    schedule: str = setting(
        "constant",
        "constant; cosine: falls to 0 at the end of the run; multistep: times gamma at each "
        "milestone",
        choices=("constant", "cosine", "multistep"),
    )
    milestones: tuple[int, ...] = setting((), "images seen, rising; for multistep", minimum=1)
    gamma: float = setting(0.1, "factor at each milestone", above=0, below=1)
    beta1: float = setting(0.9, "decay of the gradient's mean", minimum=0, below=1)
    beta2: float = setting(0.999, "decay of the gradient's square", minimum=0, below=1)
    weight_decay: float = setting(0.01, "decoupled weight decay", minimum=0)
    clip_norm: float | None = setting(None, "longest gradient; longer ones are cut", above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    generator: AdamW = dataclasses.field(default_factory=AdamW)
    discriminator: AdamW = dataclasses.field(default_factory=AdamW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    epochs: int = setting(10, "passes over the training shards", minimum=1)
    global_batch_size: int = setting(16, "HR crops per step, all ranks together", minimum=1)
    warmup_images: int = setting(
        0, "crops seen under the pixel loss alone before the other losses join", minimum=0
    )
    ramp_images: int = setting(
        0, "crops after the warm-up over which the adversarial weight rises from 0", minimum=0
    )
    accumulation_steps: int = setting(
        1,
        "parts that each rank's share of a batch is computed in, to save memory, for a second "
        "forward of the generator; BatchNorm then sees the parts, twice",
        minimum=1,
    )
    sync_batchnorm: bool = setting(
        False,
        "BatchNorm takes its statistics from the parts of a batch on all processes together: the "
        "same training on any number of them, for two small messages a layer",
    )
    start_from: str | None = setting(
        None,
        "whose generator a new run starts from: a run, checkpoint, .pth.tar, or model of the "
        "package; its BatchNorm is folded into norm none",
        path=True,
    )
    on_nonfinite: str = setting(
        "stop",
        "after an update that was left out because its gradient was not finite: stop ends the run, "
        "skip goes on and counts it",
        choices=("stop", "skip"),
    )
    nonfinite_in_a_row: int = setting(
        10, "steps in a row without an update after which skip stops too", minimum=1
    )
    ema_half_life: float = setting(
        0,
        "crops after which a weight counts half in the averaged generator; 0: no average",
        minimum=0,
    )
    compile: bool = setting(
        False,
        "run both networks through torch.compile: the first steps take minutes, later ones are "
        "fewer operations on GPUs (on CPUs no gain); needs Triton there, a C++ compiler here",
    )
    cuda_graphs: bool = setting(
        False,
        "record the operations of a step on a GPU once, and play them back: faster where naming "
        "them takes the CPU longer than the GPU needs, as with small networks; the memory of a "
        "step stays taken; not in fp16",
    )
    gradient_compression: str = setting(
        "none",
        "of gradients on their way between processes: bf16 halves what is sent, and rounds; for "
        "slow networks (on CPUs it takes longer)",
        choices=("none", "bf16"),
    )
    mixed_precision: str | None = setting(
        None,
        "no, bf16 or fp16; null takes what accelerate launch was told",
        choices=("no", "bf16", "fp16"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    every_epochs: int = setting(1, "evaluate after every so many epochs, and the last", minimum=1)
    protocol: str = setting("y", "y: luma; rgb: all channels", choices=("y", "rgb"))
    ranks: str = setting(
        "main",
        "main: rank 0 measures, and the others wait; all: each measures its share, for the same "
        "numbers",
        choices=("main", "all"),
    )
    tile: int | None = setting(
        None,
        "side of the LR tiles that bound memory, pixels; null: as many pixels as the crops that a "
        "process trains on at once have",
        minimum=tiles.SMALLEST_SIDE,
    )
    lpips: str | None = setting(
        None,
        "weights of torchvision's squeezenet1_1, a file: measure LPIPS too, of whole pictures, "
        "which takes 0.6 GB a megapixel",
        path=True,
    )
    samples: int = setting(4, "pictures kept of each evaluation", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int | None = setting(
        None, "save within an epoch too, every so many steps", minimum=1
    )
    every_minutes: float | None = setting(
        None, "save within an epoch too, when so many minutes have passed", above=0
    )
    keep: int = setting(3, "newest checkpoints kept", minimum=1)
    best: str | None = setting(
        "psnr",
        "the one that was best by this metric of the validation pictures is kept too, and a link "
        "best in the run's folder names it; null: none",
        choices=("psnr", "ssim", "lpips"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    log_every_steps: int = setting(50, "steps between scalars and progress updates", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = dataclasses.field(default_factory=Run)
    data: Data
    stream: Stream = dataclasses.field(default_factory=Stream)
    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    train: Train = dataclasses.field(default_factory=Train)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides, later ones winning.

    Raises:
        UserError: with every problem found, one a line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {path}: {error.strerror}. Recipes are in configs/."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; expected a YAML recipe") from None
    try:
        values = yaml.load(text, settings.Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as 'data:' and 'train:', found {values!r}")
    problems: list[str] = []
    for override in overrides:
        settings.apply_override(values, override, problems)
    given = dict(override.partition("=")[::2] for override in overrides)
    config = settings.build(Config, values, "", problems, given)
    if config is not None:
        problems += _contradictions(config)
    if problems:
        listing = "".join(
            f"\n  {problem}" + " (command line)" * _is_of(problem.partition(":")[0], given)
            for problem in problems
        )
        raise UserError(f"{path}: {len(problems)} problem(s) in the configuration:{listing}")
    return typing.cast(Config, config)


def _is_of(place: str, given: Collection[str]) -> bool:
    """Whether a key of `given` is `place`, or lies in that section."""
    return any(key == place or key.startswith(f"{place}.") for key in given)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back to an equal `Config`."""
    return settings.as_yaml(dataclasses.asdict(config))


def _contradictions(config: Config) -> list[str]:
    """Problems that no single key shows."""
    problems = []
    if Path(config.run.name).name != config.run.name or config.run.name in ("", ".", ".."):
        problems.append(f"run.name: expected a plain folder name, found {config.run.name!r}")
    if config.data.crop_size % config.data.scale:
        problems.append(
            f"data.crop_size: {config.data.crop_size} is not a multiple of data.scale "
            f"({config.data.scale})"
        )
    if config.data.decode == "nvjpeg":
        if config.data.channels != 3:
            problems.append("data.decode: nvjpeg is for colour pictures, and data.channels is 1")
        if config.data.degradation != type(config.data.degradation)():
            problems.append("data.decode: nvjpeg leaves no room for data.degradation; use cpu")
        if config.stream.on_error == "skip":
            problems.append(
                "data.decode: nvjpeg finds damage too late for stream.on_error=skip; use cpu"
            )
    for name, (low, high) in dataclasses.asdict(config.data.degradation).items():
        if low > high:
            problems.append(
                f"data.degradation.{name}: expected the lower end first, found [{low}, {high}]"
            )
    blur = config.data.degradation.blur_sigma[1]
    if math.ceil(3 * blur) >= config.data.crop_size:
        problems.append(
            f"data.degradation.blur_sigma: {blur} reaches further than data.crop_size "
            f"({config.data.crop_size}); use less than a third of it"
        )
    if config.loss.adversarial.weight > 0 and config.data.crop_size < 32:
        problems.append(
            f"data.crop_size: {config.data.crop_size} is too small for the discriminator; use 32 "
            "or more, or loss.adversarial.weight=0"
        )
    left = config.data.crop_size - config.loss.content.shift
    if config.loss.content.weight > 0 and left < 16:
        problems.append(
            f"loss.content.shift: leaves {left} pixels of data.crop_size "
            f"{config.data.crop_size}, and the network needs 16"
        )
    if config.loss.adversarial.label_smoothing and config.loss.adversarial.kind in (
        "linear",
        "hinge",
    ):
        problems.append(
            f"loss.adversarial.label_smoothing: {config.loss.adversarial.kind} has no target that "
            "could be smoothed"
        )
    for name in ("generator", "discriminator"):
        adamw: AdamW = getattr(config.optimizer, name)
        if (adamw.schedule == "multistep") != bool(adamw.milestones):
            problems.append(
                f"optimizer.{name}.milestones: multistep needs some, and only multistep has them"
            )
        if list(adamw.milestones) != sorted(set(adamw.milestones)):
            problems.append(
                f"optimizer.{name}.milestones: expected rising numbers, found "
                f"{list(adamw.milestones)}"
            )
    if (
        config.train.accumulation_steps > 1
        and config.loss.adversarial.weight > 0
        and config.loss.adversarial.kind == "relativistic_average"
    ):
        problems.append(
            "train.accumulation_steps: relativistic_average compares with the average of the "
            "batch, which its parts do not know; use 1"
        )
    if config.train.compile and config.loss.adversarial.r1_weight:
        problems.append(
            "train.compile: torch.compile cannot differentiate twice, which "
            "loss.adversarial.r1_weight needs"
        )
    if config.train.cuda_graphs:
        problems += _graph_problems(config)
    if config.train.global_batch_size % config.train.accumulation_steps:
        problems.append(
            f"train.accumulation_steps: {config.train.accumulation_steps} does not divide "
            f"train.global_batch_size ({config.train.global_batch_size})"
        )
    if not any(
        term.weight > 0
        for term in (config.loss.pixel, config.loss.content, config.loss.adversarial)
    ):
        problems.append("loss: pixel, content and adversarial weights are all 0; nothing to learn")
    if config.checkpoint.best == "lpips" and config.evaluation.lpips is None:
        problems.append("checkpoint.best: lpips is not measured; set evaluation.lpips to a file")
    if config.train.warmup_images and not config.loss.pixel.weight:
        problems.append("train.warmup_images: the warm-up trains on loss.pixel, whose weight is 0")
    return problems


def _graph_problems(config: Config) -> list[str]:
    adversarial, content = config.loss.adversarial, config.loss.content
    reasons = {
        "train.compile, which records steps of its own": config.train.compile,
        "loss.content.shift, which differs from step to step": content.weight and content.shift,
        # A test on a GPU has them; until it has passed, nothing is known of them.
        "loss.adversarial.r1_weight, not known to be right so far": (
            adversarial.weight and adversarial.r1_weight
        ),
        "model.discriminator.name unet, not known to be right so far": (
            adversarial.weight and config.model.discriminator.name == "unet"
        ),
    }
    return [
        f"train.cuda_graphs: cannot be had together with {reason}; leave one of them out"
        for reason, applies in reasons.items()
        if applies
    ]
