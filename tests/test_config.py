from __future__ import annotations

from pathlib import Path

import pytest

from sr_dist import config, settings
from sr_dist.errors import UserError
from tests.helpers import REPOSITORY

LEAST = "data: {train: shards, validation: pictures}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> config.Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path, overrides)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_reads_back(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    assert load(tmp_path, config.to_yaml(loaded)) == loaded
    top = path.read_text().partition("\nrun:")[0]
    for said in ("# Trains: ", "# On: ", "# How long: ", "# Reached: "):
        assert said in top, said


def test_defaults_are_the_published_settings(tmp_path: Path) -> None:
    loaded = load(tmp_path, LEAST)
    assert loaded.loss.content.weight == 0.006
    assert loaded.loss.adversarial.weight == 0.001
    assert loaded.loss.total_variation.weight == 2e-8
    assert loaded.optimizer.generator.learning_rate == 1e-3
    assert (loaded.model.generator.num_channels, loaded.model.generator.num_blocks) == (64, 16)
    assert loaded.model.generator.global_skip == "none"


def test_all_problems_come_at_once_each_with_its_key(tmp_path: Path) -> None:
    text = """
        data: {train: shards, scle: 4, crop_size: big}
        loss: {pixel: {kind: mes}}
        optimizer: {generator: {learning_rate: -1}}
    """
    with pytest.raises(UserError) as caught:
        words = (
            "train.epochs=0",
            "tracking=3",
            "nonsense",
            "train.amp=true",
            "epochs=3",
            "run.name=",
        )
        load(tmp_path, text, *words)
    message = str(caught.value)
    assert "11 problem(s)" in message
    for expected in (
        "data.scle: unknown key; did you mean data.scale?",
        "data.validation: missing",
        "data.crop_size: expected a whole number, found 'big'",
        "loss.pixel.kind: expected one of mse, l1, charbonnier, found 'mes'; did you mean mse?",
        "optimizer.generator.learning_rate: expected more than 0, found -1",
        "train.epochs: expected at least 1, found 0 (command line)",
        "'nonsense': expected section.key=value",
        "train.amp: unknown key; valid: epochs",
        "tracking: expected a section with keys, found 3",
        "epochs: unknown key; did you mean train.epochs?",
        "run.name: expected text, found nothing (command line)",
    ):
        assert expected in message


def test_unknown_keys_hide_no_contradiction(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, LEAST, "data.crop_size=98", "data.degradation.blurr=1", "losses.x=1")
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert "data.degradation.blurr: unknown key; valid: blur_sigma" in message
    assert "losses: unknown key; did you mean loss? (command line)" in message
    assert "data.crop_size: 98 is not a multiple of data.scale (4) (command line)" in message


def test_section_that_is_no_section(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train: expected a section with keys, found 3"):
        load(tmp_path, LEAST, "train=3")


def test_numbers_are_read_by_their_annotation(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        LEAST + "optimizer: {generator: {learning_rate: 1e-4, weight_decay: 0}}\n"
        "train: {mixed_precision: no}",
    )
    assert loaded.optimizer.generator.learning_rate == 1e-4  # PyYAML gives a string
    assert loaded.optimizer.generator.weight_decay == 0.0
    assert loaded.train.mixed_precision == "no"  # PyYAML gives False
    assert load(tmp_path, LEAST, "train.mixed_precision=null").train.mixed_precision is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.crop_size=96.5", "data.crop_size: expected a whole number, found 96.5"),
        ("data.crop_size=true", "data.crop_size: expected a whole number, found True"),
        ("loss.pixel.weight=.nan", "loss.pixel.weight: expected a finite number"),
        ("loss.pixel.weight=.inf", "loss.pixel.weight: expected a finite number"),
        ("run.name=a/b", "run.name: expected a plain folder name"),
        ("run.name=..", "run.name: expected a plain folder name"),
        ("run.name=2024", """run.name: expected text, found 2024; for the text, write '"2024"'"""),
        ("run.name=off", """run.name: expected text, found False; for the text, write '"off"'"""),
        ("run.name=2024-01-01", """for the text, write '"2024-01-01"'"""),
        ("loss.content.layers=[off]", "expected text, found False; for the text, write it in quo"),
        ("run.seed=99999999999999999999", "run.seed: expected at most 9223372036854775808"),
        ("optimizer.generator.beta1=1.5", "optimizer.generator.beta1: expected less than 1"),
        ("data.crop_size=98", "data.crop_size: 98 is not a multiple of data.scale"),
        ("data.crop_size=16", "data.crop_size: 16 is too small for the discriminator"),
        ("data.scale=3", "data.scale: expected one of 2, 4, 8, found 3"),
        ("checkpoint.best=lpips", "checkpoint.best: lpips is not measured; set evaluation.lpips"),
    ],
)
def test_values_out_of_range(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, LEAST, override)
    assert expected in str(caught.value)


def test_a_shift_leaves_what_the_content_network_needs(tmp_path: Path) -> None:
    small = ("loss.adversarial.weight=0", "data.crop_size=24")
    load(tmp_path, LEAST, *small, "loss.content.shift=8")
    with pytest.raises(UserError, match="shift: leaves 15 pixels of data.crop_size 24, and the n"):
        load(tmp_path, LEAST, *small, "loss.content.shift=9")
    load(tmp_path, LEAST, *small, "loss.content.shift=9", "loss.content.weight=0")


def test_overrides_reach_sections_the_file_does_not_have(tmp_path: Path) -> None:
    loaded = load(tmp_path, LEAST, "loss.content.weight=0", "loss.content.weight=0.5")
    assert loaded.loss.content.weight == 0.5


def test_text_that_looks_like_a_number(tmp_path: Path) -> None:
    assert load(tmp_path, LEAST, """run.name='2024'""").run.name == "2024"
    assert load(tmp_path, LEAST, 'run.name="2024"').run.name == "2024"


def test_text_that_yaml_reads_as_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found False; for the text, write it in quotes"):
        load(tmp_path, LEAST + "run: {name: off}\n")
    assert load(tmp_path, LEAST + "run: {name: 'off'}\n").run.name == "off"


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the key 'train' stands twice"):
        load(tmp_path, LEAST + "train: {epochs: 3}\nrun: {seed: 1}\ntrain: {warmup_images: 5}\n")


def test_binary_files_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        config.load(tmp_path / "b.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "data: {train: [\n"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        load(tmp_path, text)
    with pytest.raises(UserError, match="cannot read the configuration"):
        config.load(tmp_path / "none.yaml")


def test_every_setting_is_described_in_the_readme_of_the_recipes() -> None:
    page = (REPOSITORY / "configs" / "README.md").read_text()
    table = settings.describe(config.Config)
    assert table in page, f"configs/README.md lacks this table:\n{table}"
    assert "| `train.epochs` | whole number | 10 | passes over the training shards" in table


def test_parts_of_a_batch_do_not_know_its_average(tmp_path: Path) -> None:
    words = ("train.accumulation_steps=2", "loss.adversarial.kind=relativistic_average")
    with pytest.raises(UserError, match="relativistic_average compares with the average of the"):
        load(tmp_path, LEAST, *words)
    load(tmp_path, LEAST, *words, "loss.adversarial.weight=0")


def test_what_torch_compile_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.compile: torch.compile cannot differentiate twice"):
        load(tmp_path, LEAST, "train.compile=true", "loss.adversarial.r1_weight=1")


@pytest.mark.parametrize(
    "word",
    [
        "train.compile=true",
        "loss.content.shift=4",
        "loss.adversarial.r1_weight=1",
        "model.discriminator.name=unet",
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, word: str) -> None:
    name = word.partition("=")[0]
    with pytest.raises(UserError, match=f"train.cuda_graphs: cannot be had together with {name}"):
        load(tmp_path, LEAST, "train.cuda_graphs=true", word)
    off = ("loss.content.weight=0", "loss.adversarial.weight=0")
    if word != "train.compile=true":
        load(tmp_path, LEAST, "train.cuda_graphs=true", word, *off)


def test_a_warm_up_needs_what_it_trains_on(tmp_path: Path) -> None:
    words = ("train.warmup_images=100", "loss.pixel.weight=0")
    with pytest.raises(UserError, match="the warm-up trains on loss.pixel, whose weight is 0"):
        load(tmp_path, LEAST, *words)


def test_home_folders_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "a.yaml").write_text("data: {train: ~/shards, validation: there/~}")
    found = config.load(tmp_path / "a.yaml", ["run.output_dir=~/runs"])
    assert found.data.train == "/home/someone/shards"
    assert (found.run.output_dir, found.data.validation) == ("/home/someone/runs", "there/~")


def test_lists(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        LEAST,
        "loss.content.layers=[3, conv1_2]",
        "optimizer.generator.schedule=multistep",
        "optimizer.generator.milestones=[100, 200]",
        "data.degradation.blur_sigma=[0, 1.5]",
    )
    assert loaded.loss.content.layers == ("3", "conv1_2")
    assert loaded.optimizer.generator.milestones == (100, 200)
    assert loaded.data.degradation.blur_sigma == (0.0, 1.5)
    assert load(tmp_path, config.to_yaml(loaded)) == loaded
    for override, message in (
        ("loss.content.layers=3", "loss.content.layers: expected a list, as in [a, b], found 3"),
        ("data.degradation.jpeg_quality=[1, 2, 3]", "expected a list of 2 values"),
        ("data.degradation.jpeg_quality=[0, 50]", "jpeg_quality: expected at least 1, found 0"),
        ("data.degradation.noise_sigma=[5, 2]", "expected the lower end first, found [5.0, 2.0]"),
        ("optimizer.generator.milestones=[5]", "only multistep has them"),
        ("optimizer.generator.milestones=[x]", "expected a whole number, found 'x'"),
        ("loss.adversarial.label_smoothing=0.1", "linear has no target that could be smoothed"),
        ("train.accumulation_steps=3", "3 does not divide train.global_batch_size (16)"),
        ("data.degradation.blur_sigma=[0, 40]", "40.0 reaches further than data.crop_size (96)"),
    ):
        with pytest.raises(UserError) as caught:
            load(tmp_path, LEAST, override)
        assert message in str(caught.value)
