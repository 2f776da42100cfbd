"""Generators for use elsewhere: ONNX, torch.export, safetensors, with BatchNorm folded.

Every export is read back and compared with the generator it was made of before it appears under its
name; one that differs by more than its format's tolerance is never written.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim

from sr_dist import __version__, checkpoint, files, generators, model_card, model_files
from sr_dist.errors import UserError
from sr_dist.models import folding

# Of numbers in [0, 1]: how far the outputs of an export and of the generator may lie apart.
TOLERANCES = {"onnx": 1e-4, "torch_export": 1e-5, "safetensors": 1e-5}
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": model_files.SUFFIX}
OPSET = 18  # the first whose Resize is torch's antialiased bicubic
_TRACED = (2, 19, 31)  # batch, height, width; no two alike, for equal ones could be taken for one
_COMPARED = ((1, 32, 32), (2, 23, 37), (3, 1, 5))

log = logging.getLogger(__name__)


def check_output(output: Path, kind: str) -> None:
    """Whether an export of `kind`, a key of `TOLERANCES`, may be written to `output`.

    Raises:
        UserError: something of another kind is there.
    """
    if kind == "safetensors" and output.suffix != model_files.SUFFIX:
        model_files.check_folder(output)
    elif output.is_dir():
        raise UserError(f"{output} is a folder; expected the name of a file, such as {_name(kind)}")
    elif output.exists() and output.suffix != SUFFIXES[kind]:
        raise UserError(
            f"{output} is there already, and by its name it is no {SUFFIXES[kind]} file that could "
            "be overwritten; choose another name"
        )


def write_onnx(generator: nn.Module, description: Mapping[str, Any], output: Path) -> float | None:
    """Write an ONNX file: `lr` (batch, C, height, width) float32 in [0, 1] to `sr`, any sizes.

    `generator`: in evaluation mode, on the CPU. `description`: the arguments of
    `models.build_generator` that made it. The file's metadata hold them, and name, scale, channels
    and range.

    Returns the greatest difference between onnxruntime's output and the generator's, or None where
    onnxruntime is not installed and nothing could be compared.

    Raises:
        UserError: a package is missing, the difference is above the tolerance, or `check_output`.
    """
    check_output(output, "onnx")
    onnx = _needed("onnx")
    _needed("onnxscript")
    folded, folded_description = _fold(generator, description)
    sizes = ({0: "batch", 2: "height", 3: "width"},)
    program = torch.onnx.export(
        folded,
        (_input(description, *_TRACED),),
        input_names=["lr"],
        output_names=["sr"],
        dynamic_shapes=sizes,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "the exporter returns a program where it writes no file"
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # names of source files on this machine
    metadata = {
        "sr_dist": __version__,
        "name": description["name"],
        "scale": str(description["scale"]),
        "channels": str(description["channels"]),
        "range": "[0, 1]",
        "generator": json.dumps(folded_description),
    }
    onnx.helper.set_model_props(model, metadata)
    data = model.SerializeToString()
    onnx.checker.check_model(data)
    difference = None
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        log.warning("the ONNX file was not compared with PyTorch: onnxruntime is not installed")
    else:
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        difference = _difference(
            generator,
            description,
            lambda lr: torch.from_numpy(session.run(["sr"], {"lr": lr.numpy()})[0]),
        )
        _check_difference(difference, "onnx", output)
    files.write_whole(output, data)
    return difference


def write_torch_export(generator: nn.Module, description: Mapping[str, Any], output: Path) -> float:
    """Write what `torch.export.load(output).module()` makes a module of, for any sizes.

    Arguments as of `write_onnx`; the file holds it as its extra file `generator.json`.

    Returns the greatest difference between the module's output and the generator's.

    Raises:
        UserError: it is above the tolerance, or `check_output`.
    """
    check_output(output, "torch_export")
    folded, folded_description = _fold(generator, description)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(folded, (_input(description, *_TRACED),), dynamic_shapes=sizes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of source files on this machine
    buffer = io.BytesIO()
    extra = {"generator.json": json.dumps({"sr_dist": __version__, **folded_description})}
    torch.export.save(program, buffer, extra_files=extra)
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    difference = _difference(generator, description, loaded)
    _check_difference(difference, "torch_export", output)
    files.write_whole(output, buffer.getvalue())
    return difference


def write_safetensors(
    generator: nn.Module,
    description: Mapping[str, Any],
    output: Path,
    facts: model_card.Facts | None = None,
    bits: int | None = None,
) -> float:
    """Write a folder (or, where `output` ends in .safetensors, a file) that `sr_dist.load` opens.

    Other arguments as of `write_onnx`. `facts`: for the model card of a folder. `bits`: significant
    ones of 16-bit gray that the generator was trained with.

    Returns the greatest difference between the output of what was written and the generator's.

    Raises:
        UserError: it is above the tolerance, or `check_output`.
    """
    check_output(output, "safetensors")
    folded, folded_description = _fold(generator, description)
    data = model_files.tensors(folded, folded_description, bits)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / _name("safetensors")
        trial.write_bytes(data)
        loaded, _ = generators.load(trial)
    difference = _difference(generator, description, loaded)
    _check_difference(difference, "safetensors", output)
    if output.suffix == model_files.SUFFIX:
        files.write_whole(output, data)
    else:
        parameters = sum(parameter.numel() for parameter in folded.parameters())
        facts = facts or model_card.Facts(output.name, sources=())
        card = model_card.write(description, parameters, facts)
        model_files.write_folder(output, data, folded_description, card, bits)
    return difference


def interpolate(
    first: tuple[nn.Module, Mapping[str, Any]],
    second: tuple[nn.Module, Mapping[str, Any]],
    alpha: float,
) -> nn.Module:
    """A generator of the weights (1 - alpha) first + alpha second, BatchNorm's statistics included.

    Between a model trained for fidelity and one that was trained on from it for sharpness, `alpha`
    goes from the one to the other. `first`, `second`: generators with their descriptions.

    Raises:
        UserError: `alpha` is not in [0, 1], or the two are of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected a number from 0 to 1, found {alpha}")
    (one, of_one), (other, of_other) = first, second
    for key in [*of_one, *(key for key in of_other if key not in of_one)]:
        if of_one.get(key) != of_other.get(key):
            advice = "; launch/export.py --format safetensors folds BatchNorm" * (key == "norm")
            raise UserError(
                f"only models of one architecture can be interpolated: {key} of the first is "
                f"{of_one.get(key)}, of the second {of_other.get(key)}{advice}"
            )
    theirs = other.state_dict()
    result = copy.deepcopy(one)
    result.load_state_dict(
        {
            # Counts of batches are no weights: evaluation does not use them.
            key: (1 - alpha) * value + alpha * theirs[key] if value.is_floating_point() else value
            for key, value in one.state_dict().items()
        }
    )
    return result


def find_source(path: Path) -> model_card.Source:
    """What the files around a checkpoint say of its training; `path` as in `generators.load`."""
    recipe = meta = card = None
    name = path.name.removesuffix(".pth.tar")
    path = generators.located(path)
    if model_files.is_folder(path) and (path / model_files.CARD).is_file():
        card = (path / model_files.CARD).read_text(encoding="utf-8", errors="replace")
    if path.exists():
        path = path.absolute()
        for folder in (path, *path.parents[:2]):
            if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
                recipe = _read_recipe(folder / "config.yaml")
                break
    if path.is_dir() and not model_files.is_folder(path):
        meta = checkpoint.find_in(path).meta
    return model_card.Source(name, recipe, meta, card)


def read_metrics(path: Path, scale: int) -> dict[str, Any]:
    """The `metrics.json` that launch/evaluate.py wrote of a model that enlarges `scale` times.

    Raises:
        UserError: it is something else, or of another scale.
    """
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(metrics["protocol"], dict) and isinstance(metrics["images"], int)
        sound = sound and all(isinstance(row["name"], str) for row in metrics["results"])
        of_scale = metrics["scale"]
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is no metrics.json as launch/evaluate.py writes it")
    if of_scale != scale:
        raise UserError(f"{path} is of scale {of_scale}, but the model enlarges {scale} times")
    return metrics


def _read_recipe(path: Path) -> dict[str, Any] | None:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        log.warning("%s cannot be read as a recipe; the card says unknown", path)
        return None
    return recipe


def _fold(generator: nn.Module, description: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    assert not generator.training, "statistics of a batch cannot be folded"
    return folding.fold_batch_norm(generator), {**description, "norm": "none"}


def _input(description: Mapping[str, Any], batch: int, height: int, width: int) -> Tensor:
    """Noise in [0, 1], always the same."""
    random = np.random.default_rng(0)
    size = (batch, description["channels"], height, width)
    return torch.from_numpy(random.random(size, dtype=np.float32))


@torch.inference_mode()
def _difference(
    generator: nn.Module, description: Mapping[str, Any], exported: Callable[[Tensor], Tensor]
) -> float:
    """The greatest difference between two outputs over several sizes of batch and picture."""
    greatest = []
    for size in _COMPARED:
        lr = _input(description, *size)
        expected, found = generator(lr), exported(lr)
        assert found.shape == expected.shape, (found.shape, expected.shape)
        greatest.append((found - expected).abs().max())
    return float(torch.stack(greatest).max())  # not a number if one is not


def _check_difference(difference: float, kind: str, output: Path) -> None:
    if not difference <= TOLERANCES[kind]:  # also where it is not a number
        raise UserError(
            f"{output} was not written: its output would differ from the model's by "
            f"{difference:.1e}, more than {TOLERANCES[kind]:.0e}; are all weights finite?"
        )


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"exporting to ONNX needs the package {package}; install it with "
            "pip install 'sr_dist[export]'"
        ) from None


def _name(kind: str) -> str:
    return f"model{SUFFIXES[kind]}"
