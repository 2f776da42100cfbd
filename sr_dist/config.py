"""Settings: frozen dataclasses, read from YAML and `section.key=value`, written back as YAML.

Every problem of a configuration is reported in one `UserError`, each with its dotted key, what was
found, what was expected, and the nearest valid name. Only `launch/` and `train.py` import this
module; everything else takes plain arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sr_dist.errors import UserError

REQUIRED: Any = dataclasses.MISSING


def setting(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field, its meaning and its range: `minimum` and `maximum` belong to it, the others not."""
    limits = {
        "meaning": meaning,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
    }
    if default is REQUIRED:
        return dataclasses.field(metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    name: str = setting("run", "names the run's folder inside output_dir")
    output_dir: str = setting("runs", "folder that holds the run folders")
    seed: int = setting(0, "seeds weights, sample order, crops and flips", minimum=0, maximum=2**63)
    resume: str = setting(
        "auto",
        "auto: go on from the newest whole checkpoint; never: refuse to",
        choices=("auto", "never"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    train: str = setting(REQUIRED, "training shards: a folder with index.json, or an index.json")
    validation: str = setting(
        REQUIRED, "pictures to evaluate on: a folder, a .txt list of files, or shards"
    )
    scale: int = setting(4, "enlargement of height and width", choices=(2, 4, 8))
    channels: int = setting(3, "3: RGB, 1: gray", choices=(1, 3))
    crop_size: int = setting(96, "side of the HR training crop, pixels", minimum=16)
    crops_per_image: int = setting(4, "crops taken from one decoded tile per epoch", minimum=1)
    num_workers: int = setting(
        2, "loader processes per rank; 0 loads in the rank itself", minimum=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    name: str = setting("swift_srgan", "architecture", choices=("swift_srgan",))
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
    name: str = setting("swift_srgan", "architecture", choices=("swift_srgan",))
    head: str = setting(
        "linear",
        "linear: 6x6 pool and an 18.9 M weight layer, as published; gap: global average pool",
        choices=("linear", "gap"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    generator: Generator = dataclasses.field(default_factory=Generator)
    discriminator: Discriminator = dataclasses.field(default_factory=Discriminator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixel:
    kind: str = setting("mse", "distance between SR and HR pixels", choices=("mse", "l1"))
    weight: float = setting(1.0, "weight in the generator's loss", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    network: str = setting("mobilenet_v2", "feature network", choices=("mobilenet_v2",))
    weights: str = setting(
        "auto",
        "auto: torchvision's ImageNet weights (a 14 MB download); a file with a state dict; "
        "none: random weights, for tests only",
    )
    normalize: bool = setting(True, "normalise pictures as ImageNet ones; false: as published")
    weight: float = setting(0.006, "weight in the generator's loss; 0 leaves it out", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial:
    kind: str = setting(
        "linear",
        "linear: 1 - sigmoid(D), as published; bce: non-saturating cross-entropy",
        choices=("linear", "bce"),
    )
    weight: float = setting(
        0.001, "weight in the generator's loss; 0 trains no discriminator", minimum=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TotalVariation:
    kind: str = setting("l1", "l1: absolute differences; l2: squared", choices=("l1", "l2"))
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
        "constant, or cosine: falls to 0 at the end of the run; counted in images",
        choices=("constant", "cosine"),
    )
    beta1: float = setting(0.9, "decay of the gradient's mean", minimum=0, below=1)
    beta2: float = setting(0.999, "decay of the gradient's square", minimum=0, below=1)
    weight_decay: float = setting(0.01, "decoupled weight decay", minimum=0)


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
    ema_half_life: float = setting(
        0,
        "crops after which a weight counts half in the averaged generator; 0: no average",
        minimum=0,
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
    tile: int = setting(256, "side of the LR tiles that bound memory, pixels", minimum=16)
    samples: int = setting(4, "pictures kept of each evaluation", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int | None = setting(
        None, "save within an epoch too, every so many steps", minimum=1
    )
    keep: int = setting(3, "newest checkpoints kept", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tracking:
    log_every_steps: int = setting(50, "steps between scalars and progress updates", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = dataclasses.field(default_factory=Run)
    data: Data
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
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as 'data:' and 'train:', found {values!r}")
    problems: list[str] = []
    for override in overrides:
        _apply_override(values, override, problems)
    config = _build(Config, values, "", problems)
    if not problems:
        problems += _contradictions(config)
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{path}: {len(problems)} problem(s) in the configuration:\n{listing}")
    return typing.cast(Config, config)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


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
    if config.loss.adversarial.weight > 0 and config.data.crop_size < 32:
        problems.append(
            f"data.crop_size: {config.data.crop_size} is too small for the discriminator; use 32 "
            "or more, or loss.adversarial.weight=0"
        )
    if not any(
        term.weight > 0
        for term in (config.loss.pixel, config.loss.content, config.loss.adversarial)
    ):
        problems.append("loss: pixel, content and adversarial weights are all 0; nothing to learn")
    if config.train.warmup_images and not config.loss.pixel.weight:
        problems.append("train.warmup_images: the warm-up trains on loss.pixel, whose weight is 0")
    return problems


def _apply_override(values: dict[str, Any], override: str, problems: list[str]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        problems.append(f"{override!r}: expected section.key=value, for example train.epochs=5")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *sections, name = key.split(".")
    place: Any = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            problems.append(f"{key}: {section} is not a section; it holds {place!r}")
            return
    place[name] = value


def _build(kind: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """An instance of dataclass `kind`, or None where `problems` grew."""
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.')}: expected a section with keys, found {values!r}")
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    annotations = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid: {', '.join(fields)}"
            problems.append(f"{prefix}{name}: unknown key; {hint}")
    given: dict[str, Any] = {}
    for name, field in fields.items():
        key, annotation = f"{prefix}{name}", annotations[name]
        if dataclasses.is_dataclass(annotation):
            given[name] = _build(
                typing.cast(type, annotation), values.get(name), f"{key}.", problems
            )
        elif name in values:
            given[name] = _value(key, values[name], annotation, field.metadata, problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"{key}: missing; {field.metadata['meaning']}")
    return kind(**given) if len(problems) == before else None


def _value(
    key: str, value: Any, annotation: Any, limits: Mapping[str, Any], problems: list[str]
) -> Any:
    """`value` coerced to `annotation`, checked against `limits`."""
    kinds = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if value is None and types.NoneType in kinds:
        return None
    kind = next(k for k in kinds if k is not types.NoneType)
    # YAML reads `no` as false, `1e-4` as a string and `3` as an integer; the annotation decides.
    if kind is str and value is False and limits["choices"] and "no" in limits["choices"]:
        value = "no"
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        optional = " or null" if types.NoneType in kinds else ""
        expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        hint = f"; for the text, write '\"{value}\"'" if kind is str else ""
        problems.append(f"{key}: expected {expected[kind]}{optional}, found {value!r}{hint}")
        return value
    choices, minimum, maximum = limits["choices"], limits["minimum"], limits["maximum"]
    above, below = limits["above"], limits["below"]
    if kind is float and not math.isfinite(value):
        problems.append(f"{key}: expected a finite number, found {value!r}")
    elif choices is not None and value not in choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listing = ", ".join(str(choice) for choice in choices)
        problems.append(f"{key}: expected one of {listing}, found {value!r}{hint}")
    elif minimum is not None and not value >= minimum:
        problems.append(f"{key}: expected at least {minimum}, found {value!r}")
    elif maximum is not None and not value <= maximum:
        problems.append(f"{key}: expected at most {maximum}, found {value!r}")
    elif below is not None and not value < below:
        problems.append(f"{key}: expected less than {below}, found {value!r}")
    elif above is not None and not value > above:
        problems.append(f"{key}: expected more than {above}, found {value!r}")
    return value


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
