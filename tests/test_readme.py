"""The commands of the READMEs: their options exist, and the main path runs as it is written."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest

from sr_dist import config
from tests.helpers import REPOSITORY, succeed
from tests.runs import rows

PAGES = {"README.md": 15, "launch/README.md": 1, "tools/README.md": 1}  # and commands at least


def commands(text: str) -> list[str]:
    """Indented lines, and code in lines, that start a script of this repository."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", joined)]
    starts = re.compile(r"([A-Z_]+=\S+ )*(python|bash|accelerate|sbatch) .*\w\.(py|sh|sbatch)\b")
    return [re.split(r"\s#\s", line)[0].strip() for line in lines if starts.match(line)]


@functools.cache
def help_of(script: str) -> str:
    return succeed(script, "--help").stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_option_and_setting_exists(page: str) -> None:
    found = commands((REPOSITORY / page).read_text())
    assert len(found) >= PAGES[page]
    for command in found:
        words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
        while words and not re.fullmatch(r"(launch|tools|tests)/\w+\.(py|sh)", words[0]):
            if words[0].endswith((".yaml", ".py", ".sh")):
                assert (REPOSITORY / words[0]).is_file(), command
            words.pop(0)
        if not words or not words[0].endswith(".py") or words[0].startswith("tests/"):
            continue
        script, *rest = words
        overrides = [word for word in rest if re.match(r"[a-z_]+\.[a-z_.0-9]+=", word)]
        for option in rest:
            if option.startswith("--"):
                assert re.search(rf"{option.split('=')[0]}\b", help_of(script)), command
        recipe = "configs/quickstart.yaml"
        if "--config" in rest:
            recipe = rest[rest.index("--config") + 1]
        config.load(REPOSITORY / recipe, [word for word in overrides if "FILE" not in word])


def test_ones_own_pictures_are_trained_on_as_the_readme_says(
    photographs: Path, tmp_path: Path
) -> None:
    text = (REPOSITORY / "README.md").read_text()
    section = text.partition("## Train on your own pictures")[2].partition("\n## ")[0]
    given = [c for c in commands(section) if c.startswith("python ")]
    assert [c.split()[1] for c in given[:4]] == [
        *("tools/make_dataset.py", "tools/split_dataset.py", "tools/make_shards.py"),
        "launch/train.py",
    ]
    for name in ("tools", "launch", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    pictures = tmp_path / "home" / "Pictures"
    pictures.mkdir(parents=True)
    for path in photographs.iterdir():
        (pictures / path.name).write_bytes(path.read_bytes())
    (pictures / "scan.dcm").touch()
    smaller = (
        *("train.epochs=1", "data.crops_per_image=2", "data.crop_size=32", "data.num_workers=0"),
        *("train.global_batch_size=4", "model.generator.num_blocks=1", "loss.content.weight=0"),
        "train.start_from=null",
    )
    for command in given[:4]:
        words = command.replace("~", str(tmp_path / "home")).split()[1:]
        more = smaller if words[0] == "launch/train.py" else ()
        done = succeed(*words, *more, cwd=tmp_path, HOME=str(tmp_path / "home"))
        if words[0] == "tools/make_dataset.py":
            assert "Pictures: not looked at, by the endings of their names: 1 .dcm" in done.stdout
    assert len(rows(tmp_path / "runs" / "swift_srgan_x4")) == 1
