"""Generators to hand on: a .safetensors file, or a folder of weights, configuration and card.

The folder is what a Hugging Face repository of a model holds, and is read from there too. Nothing
in these files is executed, and none of their numbers is believed before it fits the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sr_dist import __version__, files, models, weights
from sr_dist.errors import UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
SUFFIX = ".safetensors"
_KEY = "generator"  # of the description, in CONFIG and in the header of a .safetensors file
# Numbers in a network that may be built only to say which weight does not fit it.
_HARMLESS = 20_000_000
_REPOSITORY = re.compile(r"(?:hf:/{1,2})?([A-Za-z0-9][\w.-]*/[\w][\w.-]*)", re.ASCII)
_FILES = (".pth.tar", ".pth", ".pt", ".tar", SUFFIX)  # endings of files, not of repositories


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder of the kind that `write_folder` writes."""
    return (path / CONFIG).is_file()


def read_folder(folder: Path, where: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a folder and the arguments of `models.build_generator` they fit.

    `where`: what messages call the folder, if not by its path.

    Raises:
        UserError: a file is missing, damaged, or not what `write_folder` writes.
    """
    where = where or str(folder)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{where} holds no {CONFIG}; expected a folder of an exported model"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: {CONFIG} is no JSON: it is not UTF-8") from None
    config = _parsed(text, f"{where}: {CONFIG}")
    if "sr_dist" not in config or _KEY not in config:
        raise UserError(
            f"{where}: {CONFIG} is of no sr_dist model; expected the keys sr_dist and {_KEY}"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{where} holds no {WEIGHTS}; export the model again")
    hashes = config.get("sha256")
    expected = hashes.get(WEIGHTS) if isinstance(hashes, dict) else None
    if expected is not None and expected != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(
            f"{where}: {WEIGHTS} is not the one that {CONFIG} belongs to (sha256); fetch or export "
            "the model again"
        )
    state, _ = _read_tensors(path, f"{where}: {WEIGHTS}")
    return state, fitting(config[_KEY], state, f"{where}: {CONFIG}")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a .safetensors file and the arguments of `models.build_generator` they fit.

    A file of another's making is described by its shapes, as `models.infer_generator` does.

    Raises:
        UserError: it is damaged, or its weights are of no generator known here.
    """
    state, header = _read_tensors(path, str(path))
    described = _parsed(header[_KEY], f"{path}: its header") if _KEY in header else {}
    return state, fitting(described, state, str(path))


def bits_of(path: Path) -> object:
    """What a folder or file says of the significant bits of 16-bit gray; None if nothing."""
    if path.is_dir():
        return _parsed((path / CONFIG).read_text(encoding="utf-8"), f"{path}: {CONFIG}").get("bits")
    bits = _read_header(path, str(path)).get("bits", "")
    return int(bits) if bits.isdecimal() else None


def fitting(described: object, state: Mapping[str, object], where: str) -> dict[str, Any]:
    """`described`, arguments of `models.build_generator` from a file, held against the weights.

    What a file says of sizes decides how much is built, so it must agree with the shapes of `state`
    first. What it does not say is read off them.

    Raises:
        UserError: they disagree, or this version does not know such a model.
    """
    if not isinstance(described, dict):
        raise UserError(f"{where}: the model's description is no mapping but {described!r:.60}")
    name = described.get("name", "")
    if name not in ("", *models.GENERATORS):
        raise UserError(f"{where} holds a model that this version does not know: {name!r:.60}")
    try:
        found = models.infer_generator(dict(state))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if min(found["channels"], found["num_channels"]) < 1:
        raise UserError(f"{where}: the weights are empty")
    skip = described.get("global_skip", "none")
    if skip not in ("none", "bicubic"):
        raise UserError(f"{where}: global_skip: expected none or bicubic, found {skip!r:.60}")
    found["global_skip"] = skip
    for key, value in described.items():
        if key not in found:
            raise UserError(f"{where} holds a model that this version does not know: {key!r:.60}")
        if type(value) is not type(found[key]) or value != found[key]:
            raise UserError(
                f"{where}: {key} is said to be {value!r:.60}, but the weights are of "
                f"{found[key]!r}; they are of another model"
            )
    with torch.device("meta"):  # any size in no memory
        needed = sum(v.numel() for v in models.build_generator(**found).state_dict().values())
    held = sum(
        value.untyped_storage().nbytes() // value.element_size()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    if needed > held + _HARMLESS:
        raise UserError(f"{where}: the weights lack numbers: {held} of {needed} are there")
    return found


def write_folder(
    folder: Path, data: bytes, description: Mapping[str, Any], card: str, bits: int | None = None
) -> None:
    """Write a model's folder, which appears whole or not at all.

    `data`: of `tensors`. `description`: the arguments of `models.build_generator`. `card`: the
    content of README.md. `bits`: significant ones of 16-bit gray.

    Raises:
        UserError: something else is there; a folder of this kind is replaced.
    """
    check_folder(folder)
    folder = folder.resolve()
    channels = description["channels"]
    colours = "RGB" if channels == 3 else "gray"
    config = {
        "sr_dist": __version__,
        _KEY: dict(description),
        "scale": description["scale"],
        "channels": channels,
        "input": f"(N, {channels}, H, W) float32 in [0, 1], {colours}",
        "output": f"(N, {channels}, {description['scale']}H, {description['scale']}W) float32, "
        "nominally in [0, 1]",
        "sha256": {WEIGHTS: hashlib.sha256(data).hexdigest()},
        **({} if bits is None else {"bits": bits}),
    }
    partial = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)  # a write was stopped between the two renames below
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files.write_whole(partial / WEIGHTS, data)
        files.write_whole(partial / CONFIG, json.dumps(config, indent=2) + "\n")
        files.write_whole(partial / CARD, card)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Whether `write_folder` may write there: nothing, or a model's folder and nothing besides.

    Raises:
        UserError: it may not.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file; expected the name of a folder to write, or NAME{SUFFIX}"
        )
    others = sorted({path.name for path in folder.iterdir()} - {WEIGHTS, CONFIG, CARD})
    if others:
        raise UserError(
            f"{folder} holds {others[0]}, which is no part of an exported model; choose another "
            "folder"
        )
    if any(folder.iterdir()):
        try:
            ours = "sr_dist" in json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"{folder} is a folder, but of no exported model; choose another name")


def tensors(generator: nn.Module, description: Mapping[str, Any], bits: int | None = None) -> bytes:
    """The content of a .safetensors file: the state dict, and the rest in its header."""
    state = weights.contiguous(generator)
    header = {"format": "pt", "sr_dist": __version__, _KEY: json.dumps(dict(description))}
    if bits is not None:
        header["bits"] = str(bits)
    return safetensors.torch.save(state, header)


def repository(path: PurePath) -> str | None:
    """The Hugging Face repository that `path`, at which nothing lies, may name: `owner/name`.

    None where it can only be a path: by its form or ending, or because its folder is there (a
    mistyped `runs/nmae` must not be looked for in the network). `hf://owner/name` is a repository.
    """
    found = _REPOSITORY.fullmatch(path.as_posix())
    if not found or path.as_posix().endswith(_FILES):
        return None
    explicit = path.as_posix().startswith("hf:")
    return found[1] if explicit or not Path(path.parts[0]).exists() else None


def download(repository: str, revision: str | None = None) -> Path:
    """The folder of a Hugging Face repository in the local cache, fetched where it is not there.

    `revision`: a branch, tag or commit; None for the main branch.

    Raises:
        UserError: it cannot be had.
    """
    import huggingface_hub  # at need: slow to import

    try:
        # One call for both files, so that they are of one commit.
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS]
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        at = f" at {revision}" if revision else ""
        raise UserError(
            f"{repository} is no path here, and no Hugging Face repository of that name{at} could "
            f"be opened: {reason:.300}"
        ) from None
    return Path(folder)


def _read_header(path: Path, where: str) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{where} is no safetensors file, or is damaged: {error}") from None


def _read_tensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = _read_header(path, where)
    try:
        return safetensors.torch.load_file(path), header
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{where} is no safetensors file, or is damaged: {error}") from None


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping, found {text.strip()!r:.60}")
    return values
