from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sr_dist
from sr_dist import checkpoint, export, generators, images, model_card, tensors
from sr_dist.errors import UserError
from sr_dist.models import folding
from tests.generators import FAMILIES, build, describe, difference
from tests.helpers import REPOSITORY, refuse, succeed

CASES = [  # family, scale, channels, norm, global_skip
    ("swift_srgan", 2, 1, "batch", "bicubic"),
    ("swift_srgan", 4, 3, "batch", "none"),
    ("swift_srgan", 8, 3, "none", "bicubic"),
    ("srgan", 2, 3, "none", "none"),
    ("srgan", 4, 3, "batch", "bicubic"),
    ("srgan", 8, 1, "batch", "none"),
]


def case(
    name: str, scale: int, channels: int, norm: str, skip: str
) -> tuple[nn.Module, dict[str, Any]]:
    description = describe(name, scale=scale, channels=channels, norm=norm, global_skip=skip)
    return build(description), description


# Formats


@pytest.mark.parametrize(("name", "scale", "channels", "norm", "skip"), CASES)
def test_onnx_takes_any_size_and_gives_what_pytorch_gives(
    name: str, scale: int, channels: int, norm: str, skip: str, tmp_path: Path
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    generator, description = case(name, scale, channels, norm, skip)
    path = tmp_path / "new" / "model.onnx"
    measured = export.write_onnx(generator, description, path)
    assert measured is not None and 0 <= measured <= 1e-4
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (lr,), (sr,) = session.get_inputs(), session.get_outputs()
    assert (lr.name, lr.type, sr.name, sr.type) == ("lr", "tensor(float)", "sr", "tensor(float)")
    assert lr.shape == ["batch", channels, "height", "width"] and sr.shape[:2] == lr.shape[:2]
    found = difference(
        generator, lambda x: torch.from_numpy(session.run(None, {"lr": x.numpy()})[0]), channels
    )
    assert found < 1e-4

    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata.pop("generator")) == {**description, "norm": "none"}
    assert metadata == {
        "sr_dist": sr_dist.__version__,
        "name": name,
        "scale": str(scale),
        "channels": str(channels),
        "range": "[0, 1]",
    }
    assert str(REPOSITORY).encode() not in path.read_bytes(), "where the code lies is not told"


@pytest.mark.parametrize(("name", "scale", "channels", "norm", "skip"), CASES)
def test_torch_export_takes_any_size_and_gives_what_the_generator_gives(
    name: str, scale: int, channels: int, norm: str, skip: str, tmp_path: Path
) -> None:
    generator, description = case(name, scale, channels, norm, skip)
    path = tmp_path / "new" / "model.pt2"
    assert 0 <= export.write_torch_export(generator, description, path) <= 1e-5
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    extra = {"generator.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert difference(generator, program.module(), channels) < 1e-5
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    held = json.loads(extra["generator.json"])
    assert held == {"sr_dist": sr_dist.__version__, **description, "norm": "none"}
    assert str(REPOSITORY).encode() not in path.read_bytes()


@pytest.mark.parametrize(("name", "scale", "channels", "norm", "skip"), CASES)
def test_safetensors_open_in_one_line(
    name: str, scale: int, channels: int, norm: str, skip: str, tmp_path: Path
) -> None:
    generator, description = case(name, scale, channels, norm, skip)
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        assert 0 <= export.write_safetensors(generator, description, path) <= 1e-5
        loaded = sr_dist.load(path)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert not loaded.training and difference(generator, loaded, channels) < 1e-5
        _, held = generators.load(path)
        assert held == {**description, "norm": "none"}
    names = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")}
    assert names == {
        *("folder", "one.safetensors"),
        *(f"folder/{name}" for name in ("model.safetensors", "config.json", "README.md")),
    }
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["sr_dist"] == sr_dist.__version__
    assert (config["scale"], config["channels"]) == (scale, channels)
    assert config["generator"] == {**description, "norm": "none"}


def test_published_weights_in_every_format(shared: Path, tmp_path: Path) -> None:
    path = shared / "weights" / "swift_srgan_4x.pth.tar"
    generator, description = generators.load(path)
    photograph = images.decode(sorted((shared / "benchmarks/Set5/LR_bicubic/X4").iterdir())[0], 3)
    lr = tensors.to_float(tensors.to_batch([photograph]))
    with torch.inference_mode():
        expected = generator(lr)
        for other in (folding.fold_batch_norm(generator), sr_dist.load(path)):
            assert (other(lr) - expected).abs().max() < 1e-5
        assert export.write_safetensors(generator, description, tmp_path / "folder") < 1e-5
        assert (sr_dist.load(tmp_path / "folder")(lr) - expected).abs().max() < 1e-5
    assert export.write_torch_export(generator, description, tmp_path / "m.pt2") < 1e-5
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    measured = export.write_onnx(generator, description, tmp_path / "m.onnx")
    assert measured is not None and measured < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    sr = session.run(["sr"], {"lr": np.ascontiguousarray(lr.numpy())})[0]
    assert np.abs(sr - expected.numpy()).max() < 1e-4


# Refusals


WRITERS: dict[str, Callable[..., float | None]] = {
    "onnx": export.write_onnx,
    "torch_export": export.write_torch_export,
    "safetensors": export.write_safetensors,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_differs_is_not_written(kind: str, value: float, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    description = describe()
    generator = build(description)
    generator.state_dict()["initial.act.weight"].fill_(value)
    output = tmp_path / f"model{export.SUFFIXES[kind]}"
    with pytest.raises(UserError, match="was not written: its output would differ from the model"):
        WRITERS[kind](generator, description, output)
    assert not list(tmp_path.iterdir())


def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = describe()
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            if package == "onnxscript":
                pytest.importorskip("onnx")
            with pytest.raises(UserError, match=rf"package {package}; .* 'sr_dist\[export\]'"):
                export.write_onnx(build(description), description, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_file_is_written_and_nothing_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    description = describe()
    with caplog.at_level(logging.WARNING):
        assert export.write_onnx(build(description), description, tmp_path / "x.onnx") is None
    assert "not compared with PyTorch: onnxruntime is not installed" in caplog.text
    assert (tmp_path / "x.onnx").is_file()


def test_only_what_an_export_wrote_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"a picture")
    (tmp_path / "old.onnx").write_bytes(b"a model")
    folder = tmp_path / "folder"
    folder.mkdir()
    for kind in export.TOLERANCES:
        for free in (tmp_path / "new", tmp_path / "deep" / f"new{export.SUFFIXES[kind]}"):
            export.check_output(free, kind)
        with pytest.raises(UserError, match="picture.png is"):
            export.check_output(tmp_path / "picture.png", kind)
    with pytest.raises(UserError, match=r"old.onnx is there already, .* no .pt2 file"):
        export.check_output(tmp_path / "old.onnx", "torch_export")
    export.check_output(tmp_path / "old.onnx", "onnx")
    with pytest.raises(UserError, match="folder is a folder; expected the name of a file, such as"):
        export.check_output(folder, "onnx")
    export.check_output(folder, "safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="folder, but of no exported model"):
        export.check_output(folder, "safetensors")
    (folder / "holiday.txt").write_text("")
    with pytest.raises(UserError, match="folder holds holiday.txt, which is no part of"):
        export.write_safetensors(build(describe()), describe(), folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "holiday.txt"}


def test_an_exported_folder_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first, second = tmp_path / "folder", describe(), describe(scale=4)
    export.write_safetensors(build(first), first, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export.files, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            export.write_safetensors(build(second), second, path)
    assert difference(build(first), sr_dist.load(path)) < 1e-5, "the old one is still there"
    path.rename(tmp_path / ".folder.old")  # as a write leaves it that is stopped at the worst time
    with monkeypatch.context() as patch:
        patch.setattr(export.files, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            export.write_safetensors(build(second), second, path)
    assert difference(build(first), sr_dist.load(path)) < 1e-5, "and is put back"
    (tmp_path / "link").symlink_to(path)
    export.write_safetensors(build(second), second, tmp_path / "link")
    assert difference(build(second), sr_dist.load(path)) < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "link"}, "nothing is left over"


# Interpolation


@pytest.mark.parametrize("name", FAMILIES)
def test_interpolation_is_linear_in_weights_and_statistics(name: str) -> None:
    description = describe(name)
    one, other = build(description, 1), build(description, 2)
    before = [value.clone() for value in one.state_dict().values()]
    pair = (one, description), (other, description)
    for alpha in (0.0, 0.25, 1.0):
        result = export.interpolate(*pair, alpha).state_dict()
        for key, a, b in zip(
            result, one.state_dict().values(), other.state_dict().values(), strict=True
        ):
            if a.is_floating_point():
                expected = (1 - alpha) * a + alpha * b
                assert torch.equal(result[key], expected), (key, alpha)
            else:
                assert int(result[key]) == 8, "counts of batches are the first's"
    assert all(map(torch.equal, before, one.state_dict().values()))
    # The ends are the models themselves, to the last bit.
    lr = torch.rand(1, 3, 8, 9)
    assert torch.equal(export.interpolate(*pair, 0.0)(lr), one(lr))
    assert torch.equal(export.interpolate(*pair, 1.0)(lr), other(lr))
    assert not torch.allclose(export.interpolate(*pair, 0.5)(lr), one(lr), atol=1e-3)


def test_interpolation_refuses() -> None:
    one = build(describe()), describe()
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="expected a number from 0 to 1, found"):
            export.interpolate(one, one, alpha)
    deep = describe(num_blocks=2)
    with pytest.raises(UserError, match="num_blocks of the first is 1, of the second 2"):
        export.interpolate(one, (build(deep), deep), 0.5)
    plain = describe(norm="none")
    with pytest.raises(UserError, match="norm of the first is batch, .* safetensors folds Batch"):
        export.interpolate(one, (build(plain), plain), 0.5)


def test_metrics_are_of_the_models_scale(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    sound = {"scale": 4, "protocol": {}, "images": 1, "results": [{"name": "x"}]}
    path.write_text(json.dumps(sound))
    assert export.read_metrics(path, 4) == sound
    with pytest.raises(UserError, match="is of scale 4, but the model enlarges 2 times"):
        export.read_metrics(path, 2)
    for other in ("[", "[]", "{}", json.dumps({**sound, "results": 3}), "[" * 100_000):
        path.write_text(other)
        with pytest.raises(UserError, match="is no metrics.json as launch/evaluate.py writes it"):
            export.read_metrics(path, 4)


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint and one of the published files."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    description = describe()
    generator = build(description)
    meta = {"generator": description, "images_seen": 96, "versions": {"torch": "2.0"}}
    held = checkpoint.snapshot(12, {"generator": generator}, {}, meta)
    checkpoint.write(folder / "checkpoints", held, keep=1)
    generators.save_published(generator, folder / "models" / "netG.pth.tar", description)
    (folder / "config.yaml").write_text("data: {train: /home/somebody/shards}\n")
    return folder


def test_command_writes_a_folder_that_every_command_takes(
    run: Path, picture: images.Picture, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"scale": 2, "protocol": {}, "images": 1, "results": []}))
    output = tmp_path / "exported"
    done = succeed(
        *("launch/export.py", "--checkpoint", run, "--format", "safetensors", "--output", output),
        *("--license", "mit", "--data", "eight photographs", "--metrics", metrics),
    )
    assert "exported: swift_srgan, x2, differs from the model by " in done.stdout
    card = (output / "README.md").read_text()
    assert "license: mit\n" in card and "eight photographs" in card
    assert "# exported" in card and "train: shards" in card and "- steps: 12" in card
    images.save(picture, tmp_path / "picture.png")
    results = tmp_path / "results"
    done = succeed(
        *("launch/evaluate.py", "--data", tmp_path / "picture.png", "--scale", 2),
        *("--checkpoint", output, "--checkpoint", run, "--output", results),
    )
    one, other = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (one["name"], other["name"]) == ("exported", "small")
    assert one["psnr"] == pytest.approx(other["psnr"], abs=1e-3)


def test_command_interpolates(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth.tar"
    generators.save_published(build(describe(), 5), other, describe())
    output = tmp_path / "between.pt2"
    succeed(
        *("launch/export.py", "--interpolate", run, other, "--alpha", 0.25),
        *("--format", "torch_export", "--output", output),
    )
    models_ = (build(describe()), describe()), (build(describe(), 5), describe())
    expected = export.interpolate(*models_, 0.25)
    assert difference(expected, torch.export.load(output).module()) < 1e-5


def test_command_writes_onnx(run: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    output = tmp_path / "model.onnx"
    common = ("--checkpoint", run / "models" / "netG.pth.tar", "--format", "onnx")
    done = succeed("launch/export.py", *common, "--output", output)
    assert done.stderr == "" and "differs from the model by " in done.stdout
    session = onnxruntime.InferenceSession(output)
    found = difference(
        build(describe()), lambda x: torch.from_numpy(session.run(None, {"lr": x.numpy()})[0])
    )
    assert found < 1e-4


def test_command_refuses(run: Path, tmp_path: Path) -> None:
    command = ("launch/export.py", "--output", tmp_path / "x", "--format")
    alone = refuse(*command, "onnx", "--checkpoint", run, "--alpha", 0.5)
    assert "--interpolate A B and --alpha X go together" in alone
    message = refuse(*command, "onnx", "--checkpoint", run, "--license", "mit")
    assert "--license is for a model card; one is written by --format safetensors" in message
    message = refuse(*command, "safetensors", "--checkpoint", tmp_path / "nowhere")
    assert "nowhere does not exist; expected a run's folder" in message
    assert not list(tmp_path.iterdir())


def test_source_of_a_run_its_checkpoints_and_its_files(run: Path, tmp_path: Path) -> None:
    recipe = {"data": {"train": "/home/somebody/shards"}}
    of_run = export.find_source(run)
    assert (of_run.name, of_run.recipe) == ("small", recipe)
    assert of_run.meta is not None and of_run.meta["step"] == 12
    of_step = export.find_source(run / "checkpoints" / "step-00000012")
    assert of_step.recipe == recipe and of_step.meta == of_run.meta
    published = export.find_source(run / "models" / "netG.pth.tar")
    assert published == model_card.Source("netG", recipe, None)
    assert export.find_source(tmp_path / "x.pth.tar") == model_card.Source("x")
    shipped = export.find_source(Path("swift_srgan_x4"))
    assert shipped.name == "swift_srgan_x4" and shipped.recipe is shipped.meta is None
    assert shipped.card is not None and "\n- commit: e543158\n" in shipped.card
    other = Path(shutil.copytree(run, tmp_path / "small"))
    (other / "config.yaml").write_text("[")
    assert export.find_source(other) == model_card.Source("small", None, of_run.meta)
