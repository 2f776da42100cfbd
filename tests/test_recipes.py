"""Every recipe of configs/, shrunken: a small network on four small samples, two steps."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sr_dist import checkpoint, config, dataset, generators, images, models, shard_writer, train
from tests.helpers import REPOSITORY

RECIPES = sorted(path.stem for path in REPOSITORY.glob("configs/*.yaml"))


@pytest.fixture(scope="module")
def pictures(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four colour squares of 64 pixels, the same in 16-bit gray, and shards of both."""
    folder = tmp_path_factory.mktemp("recipes")
    astronaut = images.decode(photographs / "astronaut.png", 3)
    for kind in ("colour", "gray"):
        (folder / kind).mkdir()
    for number in range(4):
        cut = np.ascontiguousarray(astronaut[64 : 64 + 64, 50 * number : 50 * number + 64])
        images.save(cut, folder / "colour" / f"{number}.png")
        deep = cut[..., :1].astype(np.uint16) * 257
        images.save(deep, folder / "gray" / f"{number}.png")
    for kind, channels in (("colour", 3), ("gray", 1)):
        options = shard_writer.Options(tile=64, min_size=64, channels=channels)
        shard_writer.write(images.list_pictures(folder / kind), folder / f"{kind}_shards", options)
    return folder


def shrunken(name: str, pictures: Path, output: Path) -> config.Config:
    path = REPOSITORY / "configs" / f"{name}.yaml"
    whole = config.load(path)
    kind = "gray" if whole.data.channels == 1 else "colour"
    overrides = [
        f"run.output_dir={output}",
        f"data.train={pictures}/{kind}_shards",
        f"data.validation={pictures}/{kind}",
        "data.crop_size=64",
        "data.crops_per_image=1",
        "data.num_workers=0",
        "model.generator.num_channels=4",
        "model.generator.num_blocks=1",
        "loss.content.weights=none",
        "train.epochs=1",
        "train.global_batch_size=2",
        # One step of the warm-up, where there is one, and one after it.
        f"train.warmup_images={2 * bool(whole.train.warmup_images)}",
    ]
    if whole.train.start_from in generators.shipped():  # of a size that no shrunken one has
        overrides.append("train.start_from=null")
    elif whole.train.start_from:
        overrides.append(f"train.start_from={output}/{Path(whole.train.start_from).name}")
    return config.load(path, overrides)


def first_weights(settings: config.Config) -> dict[str, torch.Tensor]:
    """The parameters that a run starts from: those of its seed, or of another run."""
    if settings.train.start_from:
        return generators.load(settings.train.start_from)[0].state_dict()
    arguments = dataclasses.asdict(settings.model.generator)
    torch.manual_seed(settings.run.seed)
    return dict(
        models.build_generator(
            **arguments, scale=settings.data.scale, channels=settings.data.channels
        ).named_parameters()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str, pictures: Path, tmp_path: Path) -> None:
    settings = shrunken(name, pictures, tmp_path)
    if settings.train.start_from:
        train.run(shrunken(Path(settings.train.start_from).name, pictures, tmp_path))
    result = train.run(settings)
    found = checkpoint.find_newest(result.folder / "checkpoints")
    assert found is not None and found.step == 2
    assert ("discriminator" in found.networks()) == bool(settings.loss.adversarial.weight)
    trained = found.weights("generator")
    assert all(torch.isfinite(value).all() for value in trained.values())
    least = 0.1 * settings.optimizer.generator.learning_rate  # ten times what weight decay does
    moved = [
        name
        for name, value in first_weights(settings).items()
        if (value - trained[name]).abs().max() > least
    ]
    assert any("initial" in name for name in moved), "the first layer trained"
    assert any("final" in name for name in moved), "and the last"
    generator, _ = generators.load(result.folder)
    scale, channels = settings.data.scale, settings.data.channels
    assert generator(torch.rand(1, channels, 5, 7)).shape == (1, channels, 5 * scale, 7 * scale)
    assert result.means[1].psnr > 5


def at_full_size(name: str, output: Path) -> config.Config:
    """As the recipe is, for two steps, on squares of scikit-image's photographs."""
    path = REPOSITORY / "configs" / f"{name}.yaml"
    whole = config.load(path)
    side = min(whole.data.crop_size, 512)  # what its comment advises for them
    channels, batch = whole.data.channels, whole.train.global_batch_size
    folder = output / f"squares_{side}_{channels}_{batch}"
    if not folder.exists():
        squares = (
            np.ascontiguousarray(picture[top : top + side, left : left + side])
            for picture in map(lambda p: images.decode(p, 3), dataset.find_sample_photographs())
            for top in range(0, picture.shape[0] - side + 1, side)
            for left in range(0, picture.shape[1] - side + 1, side)
        )
        for n, square in enumerate(itertools.islice(squares, 2 * batch)):
            images.save(square[..., :channels], folder / f"{n}.png")
        options = shard_writer.Options(tile=side, min_size=side, channels=channels)
        shard_writer.write(images.list_pictures(folder), folder / "shards", options)
    return config.load(
        path,
        [
            f"run.output_dir={output}",
            f"data.train={folder}/shards",
            f"data.validation={folder}/0.png",
            f"data.crop_size={side}",
            "data.crops_per_image=1",
            "loss.content.weights=none",
            "train.epochs=1",
            f"train.warmup_images={batch * bool(whole.train.warmup_images)}",
            *(
                [f"train.start_from={output}/{Path(whole.train.start_from).name}"]
                if whole.train.start_from and whole.train.start_from not in generators.shipped()
                else []
            ),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_at_its_full_size(name: str, tmp_path: Path) -> None:
    settings = at_full_size(name, tmp_path)
    start = settings.train.start_from
    if start and start not in generators.shipped():
        train.run(at_full_size(Path(start).name, tmp_path))
    result = train.run(settings)
    found = checkpoint.find_newest(result.folder / "checkpoints")
    assert found is not None and found.step == 2
    assert all(torch.isfinite(value).all() for value in found.weights("generator").values())


def test_recipes_of_the_family_are_here() -> None:
    wanted = {"swift_srgan_x2", "swift_srgan_x4", "swift_srgan_x4_published", "swift_srgan_x8"}
    wanted |= {"srresnet_x4", "srgan_x4", "swift_srgan_x4_1024", "xray_x4", "quickstart"}
    assert wanted <= set(RECIPES)


def test_recipes_are_what_their_comments_say() -> None:
    """The published ones differ in scale alone; whole pictures are whole; the sharp one goes on."""
    load = {name: config.load(REPOSITORY / "configs" / f"{name}.yaml") for name in RECIPES}
    published = {
        scale: dataclasses.asdict(load[name])
        for scale, name in ((2, "swift_srgan_x2"), (8, "swift_srgan_x8"))
    }
    first = dataclasses.asdict(load["swift_srgan_x4_published"])
    for scale, settings in published.items():
        assert settings["data"].pop("scale") == scale
        settings["run"].pop("name")
    assert first["data"].pop("scale") == 4 and first["run"].pop("name")
    assert published[2] == published[8] == first
    weights = {term: values["weight"] for term, values in first["loss"].items()}
    expected = {"pixel": 1.0, "content": 0.006, "adversarial": 0.001, "total_variation": 2e-8}
    assert weights == expected and first["loss"]["adversarial"]["kind"] == "linear"
    whole = load["swift_srgan_x4_1024"]
    assert (whole.data.crop_size, whole.train.global_batch_size) == (1024, 2)
    sharp = load["swift_srgan_x4"]
    description = dataclasses.asdict(sharp.model.generator)
    description |= {"scale": sharp.data.scale, "channels": sharp.data.channels}
    assert sharp.train.start_from == "swift_srgan_x4_psnr"
    start = generators.load_state(Path(sharp.train.start_from), description)
    assert start.keys() == models.build_generator(**description).state_dict().keys()


def test_every_recipe_is_in_the_list() -> None:
    page = (REPOSITORY / "configs" / "README.md").read_text()
    listed = page.partition("| recipe | trains |\n")[2].partition("\n\n")[0]
    named = {
        name for row in listed.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")}
