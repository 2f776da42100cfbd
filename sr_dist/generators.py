"""Generators in files: opened from anything that holds one, written in the published format."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sr_dist import checkpoint, files, model_files, models, weights
from sr_dist.errors import UserError
from sr_dist.models import folding

SHIPPED = Path(__file__).resolve().parent / "shipped"  # a folder for each model in the package
DEFAULT = "swift_srgan_x4"  # of them, where no other model is named
_FOR_ELSEWHERE = (".onnx", ".pt2")  # what `export` writes besides
EXTRA, BITS = "sr_dist", "sr_dist_bits"  # what our .pth.tar files carry beside "model"


def shipped() -> list[str]:
    """The names of the models in the package, which `load` opens."""
    return sorted(path.name for path in SHIPPED.glob("*") if model_files.is_folder(path))


def save_published(
    module: nn.Module, path: Path, description: dict[str, Any], bits: int | None = None
) -> None:
    """Write `{"model": state_dict}`, the format of the published checkpoints.

    `description` (the arguments of `models.build_generator`) lies beside it under a key of its own,
    which readers of the published format do not look at; so do `bits`, see `bits_of`.
    """
    buffer = io.BytesIO()
    values = {"model": weights.contiguous(module), EXTRA: description}
    torch.save(values | ({} if bits is None else {BITS: bits}), buffer)
    files.write_whole(path, buffer.getvalue())


def load(path: Path | str, revision: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A generator in evaluation mode and its description, from anything that holds one.

    `path`: a run's folder or one of its checkpoints (the averaged weights where there are some), a
    `.pth.tar` in the published format, ours or another's, a folder or `.safetensors` file that
    `export` wrote, the name of a model in the package (`shipped`), or `owner/name`, a Hugging Face
    repository with what is in such a folder. `revision`: that repository's branch, tag or commit.

    Raises:
        UserError: there is none, or its weights do not fit.
    """
    state, description, where = _read(Path(path), revision)
    return _built(state, description, where).eval(), description


def bits_of(path: Path) -> int | None:
    """The significant bits of 16-bit gray that a model was trained with, if its file says so.

    `path`: as for `load`; a repository is read from where `load` has put it.

    Raises:
        UserError: what `load` raises.
    """
    bits: object = None
    path = located(path)
    if path.suffix == model_files.SUFFIX and (path.parent / checkpoint.META).is_file():
        path = path.parent  # of a checkpoint's own file, which has no header, the checkpoint tells
    if model_files.is_folder(path) or path.suffix == model_files.SUFFIX:
        bits = model_files.bits_of(path)
    elif path.is_dir():
        bits = checkpoint.find_in(path).meta.get("bits")
    elif path.is_file():
        values = weights.read(path)
        bits = values.get(BITS) if isinstance(values, dict) else None
    return bits if type(bits) is int and 9 <= bits <= 16 else None


def names(paths: Sequence[Path]) -> list[str]:
    """What to call each: the end of its path, as much as tells it apart from the others.

    Of a run's `best` or one of its steps the run's name too.
    """
    every = []
    for path in paths:
        shown = path if path.name.strip(".") else path.absolute().resolve()
        parts = [*shown.parts[:-1], shown.name.removesuffix(".pth.tar")]
        every.append([part for part in parts if part != "checkpoints"])
    called = []
    for parts in every:
        length = 2 if parts[-1] == "best" or parts[-1].startswith("step-") else 1
        while length < len(parts) and any(
            other != parts and other[-length:] == parts[-length:] for other in every
        ):
            length += 1
        called.append("/".join(parts[-length:]))
    return called


def load_state(path: Path, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the generator in `path`, of the same `description`, for a new run.

    `path`: as for `load`, but nothing that would be downloaded. Where `description` has no
    BatchNorm and the generator has, it is folded into the convolutions.

    Raises:
        UserError: there is none, or its architecture is another.
    """
    path = _in_package(path)
    if not path.exists():
        raise UserError(
            f"train.start_from: {path} does not exist; train that run first, or name a checkpoint, "
            f"a .pth.tar file or a model of the package ({', '.join(shipped()) or 'none'})"
        )
    state, found, where = _read(path)
    if (found.get("norm"), description["norm"]) == ("batch", "none"):
        folded = folding.fold_batch_norm(_built(state, found, where))
        state, found = folded.state_dict(), {**found, "norm": "none"}
    differing = [
        f"{key} {found.get(key)} instead of {description[key]}"
        for key in description
        if found.get(key) != description[key]
    ]
    if differing:
        raise UserError(
            f"train.start_from: {where} holds another generator: {', '.join(differing)}; set these "
            "as it has them, or start from another"
        )
    return state


def _built(state: dict[str, Tensor], description: dict[str, Any], where: str) -> nn.Module:
    try:
        generator = models.build_generator(**description)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} holds a model that this version does not know: {error}") from None
    weights.load(generator, state, where)
    return generator


def _read(path: Path, revision: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The state dict of a generator, its description, and what messages call its place."""
    path = _in_package(path)
    repository = None if path.exists() else model_files.repository(path)
    if repository is not None:
        where = f"{repository} (Hugging Face)"
        return *model_files.read_folder(model_files.download(repository, revision), where), where
    if revision is not None:
        raise UserError(f"{path} is no Hugging Face repository, and has no revision {revision}")
    if model_files.is_folder(path):
        return *model_files.read_folder(path), str(path)
    if path.is_dir():
        found = checkpoint.find_in(path)
        held = "ema" if "ema" in found.networks() else "generator"
        return found.weights(held), found.meta["generator"], str(path)
    if path.is_file() and path.suffix == model_files.SUFFIX:
        state, description = model_files.read_file(path)
        if (path.parent / checkpoint.META).is_file():  # which says what shapes do not
            description = checkpoint.find_in(path.parent).meta["generator"]
        return state, description, str(path)
    if path.is_file() and path.suffix in _FOR_ELSEWHERE:
        raise UserError(
            f"{path} is for use elsewhere, and is not read back; give what it was exported from, "
            "or export with --format safetensors"
        )
    if path.is_file():
        return *_read_published(path), str(path)
    raise UserError(
        f"{path} does not exist; expected a run's folder, a checkpoint's, an exported model's, a "
        ".pth.tar or .safetensors file, owner/name on Hugging Face, or a model of the package "
        f"({', '.join(shipped()) or 'none'})"
    )


def located(path: Path) -> Path:
    """Where what `load` takes lies on this machine; a repository is downloaded if it is not here.

    Raises:
        UserError: it cannot be downloaded.
    """
    path = _in_package(path)
    repository = None if path.exists() else model_files.repository(path)
    return path if repository is None else model_files.download(repository)


def _in_package(path: Path) -> Path:
    """The folder of the model that `path` names, if it is one of the package and no path here."""
    return SHIPPED / path if not path.exists() and str(path) in shipped() else path


def _read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    values = weights.read(path)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise UserError(f'{path} is no generator: expected {{"model": state_dict}}')
    state = values["model"]
    if not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} is no generator: its weights have keys that are no names")
    described = values.get(EXTRA) or {}
    if isinstance(described, dict) and "head" in described:
        raise UserError(f"{path} holds a discriminator; expected a generator (netG_…)")
    return state, model_files.fitting(described, state, str(path))
