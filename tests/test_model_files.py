from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import sr_dist
from sr_dist import checkpoint, generators, images, model_files, models, upscale
from sr_dist.errors import UserError
from tests.helpers import REPOSITORY, refuse, succeed

DESCRIPTION: dict[str, Any] = {
    "name": "srgan",
    "scale": 2,
    "channels": 3,
    "num_channels": 8,
    "num_blocks": 1,
    "norm": "none",
    "global_skip": "bicubic",
}
CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def generator() -> nn.Module:
    torch.manual_seed(3)
    built = models.build_generator(**DESCRIPTION)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.1)
    return built


@pytest.fixture
def folder(generator: nn.Module, tmp_path: Path) -> Path:
    data = model_files.tensors(generator, DESCRIPTION)
    model_files.write_folder(tmp_path / "folder", data, DESCRIPTION, "# Card\n")
    return tmp_path / "folder"


def alter(folder: Path, **changes: object) -> None:
    """Change the configuration's description of the model; None takes a key out."""
    config = json.loads((folder / "config.json").read_text())
    config["generator"] |= changes
    kept = {key: value for key, value in config["generator"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps({**config, "generator": kept}))


def replace_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]  # as of a folder that somebody put together by hand
    (folder / "config.json").write_text(json.dumps(config))


def test_folder_reads_back(folder: Path, generator: nn.Module) -> None:
    loaded, description = generators.load(folder)
    assert description == DESCRIPTION
    for (key, one), other in zip(
        generator.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key
    assert (folder / "README.md").read_text() == "# Card\n"
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == (
        folder / "config.json"
    ).stat().st_mode & 0o777, "readable by whom other files are readable by"


def test_half_precision_weights_load_as_float32(folder: Path, generator: nn.Module) -> None:
    replace_weights(folder, {k: v.half() for k, v in generator.state_dict().items()})
    loaded = sr_dist.load(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is no JSON"),
        ("", "config.json is no JSON"),
        ("[" * 100_000, "config.json is no JSON"),
        ("[1]", r"config.json: expected a mapping, found '\[1\]'"),
        ('{"model_type": "bert"}', "config.json is of no sr_dist model; expected the keys sr_dist"),
        ('{"sr_dist": "0.1.0", "generator": [1]}', r"description is no mapping but \[1\]"),
    ],
)
def test_configurations_of_something_else(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        sr_dist.load(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="config.json is no JSON: it is not UTF-8"):
        sr_dist.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "unheard_of"}, "a model that this version does not know: 'unheard_of'"),
        ({"name": ["srgan"]}, "does not know"),
        ({"name": "swift_srgan"}, "name is said to be 'swift_srgan', but the weights are of 'sr"),
        ({"attention": True}, "a model that this version does not know: 'attention'"),
        ({"num_channels": 10**9}, "num_channels is said to be 1000000000, but .* are of 8"),
        ({"num_blocks": 10**9}, "num_blocks is said to be 1000000000, but .* are of 1"),
        ({"scale": 3}, "scale is said to be 3, but the weights are of 2"),
        ({"scale": 2.0}, "scale is said to be 2.0, but the weights are of 2"),
        ({"channels": True}, "channels is said to be True, but the weights are of 3"),
        ({"norm": "batch"}, "norm is said to be 'batch', but the weights are of 'none'"),
        ({"global_skip": "lanczos"}, "global_skip: expected none or bicubic, found 'lanczos'"),
        ({"global_skip": {}}, "global_skip: expected none or bicubic, found {}"),
    ],
)
def test_descriptions_that_do_not_fit_the_weights(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    alter(folder, **changes)
    with pytest.raises(UserError, match=f"config.json.*{message}"):
        sr_dist.load(folder)


def test_what_is_not_said_is_read_off_the_weights(folder: Path) -> None:
    alter(folder, num_channels=None, norm=None, name=None)
    assert generators.load(folder)[1] == DESCRIPTION


def test_damaged_and_foreign_weights(folder: Path, generator: nn.Module) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="model.safetensors is not the one that config.json belong"):
        sr_dist.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sha256": None}))
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors is no safetensors file, or is dama"):
            sr_dist.load(folder)
    state = generator.state_dict()
    replace = {**config, "sha256": {}}
    (folder / "config.json").write_text(json.dumps(replace))
    for changed, message in (
        ({**state, "final.weight": torch.zeros(3, 8, 3, 3)}, r"final.weight has shape \(3, 8, 3"),
        ({**state, "more": torch.zeros(1)}, "weights hold more"),
        ({k: v for k, v in state.items() if k != "final.bias"}, "weights lack final.bias"),
        ({"conv.weight": torch.zeros(1)}, "no generator known here"),
        ({"initial.0.weight": torch.zeros(1), "middle.0.weight": torch.zeros(1)}, "config.json"),
        ({**state, "initial.0.weight": torch.zeros(0, 3, 9, 9)}, "config.json: the weights are em"),
    ):
        safetensors.torch.save_file(changed, weights)
        with pytest.raises(UserError, match=message):
            sr_dist.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="holds no model.safetensors"):
        sr_dist.load(folder)


def test_a_wide_first_layer_does_not_make_a_huge_network(tmp_path: Path) -> None:
    width = 1_000_000  # 12 MB here, 72 TB as a network
    state = {"initial.0.weight": torch.zeros(width, 3, 1, 1), "middle.0.weight": torch.zeros(1)}
    safetensors.torch.save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="the weights lack numbers: 3000001 of"):
        sr_dist.load(tmp_path / "wide.safetensors")
    # The same without the bytes: every element is the same place in memory.
    expanded = {key: torch.zeros(1).expand(value.shape) for key, value in state.items()}
    torch.save({"model": expanded}, tmp_path / "wide.pth.tar")
    with pytest.raises(UserError, match="the weights lack numbers: 2 of"):
        sr_dist.load(tmp_path / "wide.pth.tar")


def test_published_files_are_not_believed_either(generator: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "netG.pth.tar"
    for described, message in (
        ({**DESCRIPTION, "num_blocks": 10**9}, "num_blocks is said to be 1000000000"),
        ([1], "description is no mapping"),
    ):
        torch.save({"model": generator.state_dict(), "sr_dist": described}, path)
        with pytest.raises(UserError, match=message):
            sr_dist.load(path)
    torch.save({"model": {**generator.state_dict(), "initial.0.weight": 3}}, path)
    with pytest.raises(UserError, match="netG.pth.tar"):
        sr_dist.load(path)


def test_safetensors_of_others_are_described_by_their_shapes(
    generator: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(generator.state_dict(), path)
    _, description = generators.load(path)
    assert description == {**DESCRIPTION, "global_skip": "none"}
    safetensors.torch.save_file(generator.state_dict(), path, {"generator": "{"})
    with pytest.raises(UserError, match="x.safetensors: its header is no JSON"):
        sr_dist.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="x.safetensors is no safetensors file, or is damaged"):
        sr_dist.load(path)


def test_published_file_and_run_open_in_one_line(generator: nn.Module, tmp_path: Path) -> None:
    generators.save_published(generator, tmp_path / "netG.pth.tar", DESCRIPTION)
    held = checkpoint.snapshot(1, {"generator": generator}, {}, {"generator": DESCRIPTION})
    checkpoint.write(tmp_path / "run" / "checkpoints", held, keep=1)
    lr = torch.rand(1, 3, 6, 7)
    for path in (tmp_path / "netG.pth.tar", tmp_path / "run", str(tmp_path / "run")):
        assert torch.equal(sr_dist.load(path)(lr), generator(lr))
    with pytest.raises(UserError, match="is no Hugging Face repository, and has no revision v1"):
        sr_dist.load(tmp_path / "run", revision="v1")


@pytest.mark.parametrize(
    ("path", "repository"),
    [
        ("owner/name", "owner/name"),
        ("an-owner/A.name_4x", "an-owner/A.name_4x"),
        ("hf://owner/name", "owner/name"),
        ("hf://here/name", "here/name"),
        ("here/name", None),  # a folder of that name is here
        ("owner/netG.pth.tar", None),
        ("owner/model.safetensors", None),
        ("name", None),
        ("a/b/c", None),
        ("/owner/name", None),
        ("../name", None),
        ("./owner", None),
        ("owner/ñame", None),
        ("owner/na me", None),
        ("hf://owner", None),
    ],
)
def test_what_may_name_a_repository(
    path: str, repository: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_files.repository(PurePath(path)) == repository


def test_mistyped_path_is_not_looked_for_in_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "download", None)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/quikstart does not exist; expected a run's folder"):
        sr_dist.load("runs/quikstart")


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> dict[str, str]:
    """An environment without network in which owner/name was fetched before, at main and v1."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    for reference in ("main", "v1"):
        (repository / "refs" / reference).write_text(COMMIT)
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def test_repository_opens_from_the_cache_without_network(
    cache: dict[str, str], generator: nn.Module, tmp_path: Path
) -> None:
    torch.save(generator.state_dict(), tmp_path / "expected.pt")
    code = f"""
import sys
import sr_dist
assert "torch" not in sys.modules, "importing sr_dist is cheap"
expected = None
for revision in (None, "v1", "{COMMIT}"):
    loaded = sr_dist.load("owner/name", revision=revision)
    import torch
    expected = expected or torch.load("expected.pt", weights_only=True)
    state = loaded.state_dict()
    assert not loaded.training and state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
sr_dist.load("hf://owner/name")
for arguments in (("owner/name", "v2"), ("owner/other",)):
    try:
        sr_dist.load(*arguments)
    except sr_dist.errors.UserError as error:
        print(error)
"""
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = succeed(sys.executable, "-c", code, cwd=tmp_path, **cache, **environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("owner/name is no path here, and no Hugging Face repository of that")
    assert "at v2 could be opened: " in lines[0]
    assert lines[1].startswith("owner/other is no path here, and no Hugging Face repository of tha")


def test_commands_take_a_repository(
    cache: dict[str, str], picture: images.Picture, tmp_path: Path
) -> None:
    twelve = picture[..., :1].astype(np.uint16) * 16
    images.save(twelve, tmp_path / "a.png")
    folder = tmp_path / "hub/models--owner--name/snapshots" / COMMIT
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bits": 12}))
    command = ("launch/upscale.py", "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    fp32 = ("--checkpoint", "owner/name", "--engine", "fp32")
    succeed(*command, *fp32, cwd=tmp_path, **cache)
    loaded, options = upscale.prepare(sr_dist.load(folder), CPU), {"scale": 2, "channels": 3}
    expected = upscale.upscale_any(loaded, tmp_path / "a.png", **options, tile=128, bits=12)
    found = images.decode(tmp_path / "out" / "a.png", 1)
    assert found.shape == (128, 160, 1) and np.array_equal(found, expected)
    (folder / "config.json").write_text("{}")
    message = refuse(*command, "--checkpoint", "owner/name", cwd=tmp_path, **cache)
    assert "owner/name (Hugging Face): config.json is of no sr_dist model" in message


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, sr_dist; assert sr_dist.__version__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
