"""Which module may import which, and that the base dependencies are enough."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, contents, succeed

# A module may import those of lower levels alone.
LEVELS = [
    {"errors"},
    {"files", "ranks", "machine", "workers", "tiles"},
    {"remote", "signals", "graphs", "pool"},
    {"watch"},
    {"settings", "images", "distributed", "weights", "manifest", "web", "storage", "tars"}
    | {"model_card"},
    {"tensors", "models", "losses", "shards", "download"},
    {"metrics", "degradation"},
    {"config", "model_files", "shard_reader"},
    {"gan", "stream", "checkpoint", "tracking", "dataset", "shard_writer", "upscale", "lpips"}
    | {"finite", "indexing"},
    {"generators", "loading"},
    {"evaluate", "sources", "export"},
    {"report", "archives", "validation", "resuming"},
    {"train"},
]


def modules() -> dict[str, list[ast.stmt]]:
    """Top-level modules of sr_dist (a package counts as one) and their syntax trees."""
    found: dict[str, list[ast.stmt]] = {}
    for path in sorted((REPOSITORY / "sr_dist").rglob("*.py")):
        name = path.relative_to(REPOSITORY / "sr_dist").parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):  # which is a command
            found.setdefault(name, []).extend(ast.parse(path.read_text()).body)
    return found


def imports(body: list[ast.stmt]) -> set[str]:
    """Dotted names of everything imported, at any depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(body: list[ast.stmt]) -> set[str]:
    names = {name.split(".")[1] for name in imports(body) if name.startswith("sr_dist.")}
    return names - {"__version__"}


def test_imports_point_one_way() -> None:
    found = modules()
    assert set().union(*LEVELS) == set(found), "every module has its level"
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for name, body in found.items():
        for other in own_imports(body) - {name}:
            assert level[other] < level[name], f"{name} imports {other}"


def test_only_the_run_sees_the_configuration_and_only_one_module_accelerate() -> None:
    for name, body in modules().items():
        assert ("config" in own_imports(body)) == (name == "train"), name
        uses = any(imported.split(".")[0] == "accelerate" for imported in imports(body))
        assert uses == (name == "distributed"), name


def test_the_library_does_not_parse_arguments_or_print() -> None:
    for name, body in modules().items():
        assert not any(imported.split(".")[0] == "argparse" for imported in imports(body)), name
        calls = [node for node in ast.walk(ast.Module(body, [])) if isinstance(node, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), name


def base_distributions() -> set[str]:
    """sr_dist and all that it needs without extras, by normalised name."""

    def normalised(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    wanted, seen = ["sr-dist"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for requirement in requirements:
            if "extra ==" not in requirement:
                wanted.append(normalised(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]))
    return seen


def test_every_module_imports_with_the_base_dependencies() -> None:
    base = base_distributions()
    assert {"torch", "accelerate", "webdataset"} <= base
    modules_of: dict[bool, set[str]] = {True: set(), False: set()}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        for file in distribution.files or []:
            top = file.parts[0].removesuffix(".py")
            if file.suffix == ".py" and top.isidentifier():
                modules_of[name in base].add(top)
    foreign = sorted(modules_of[False] - modules_of[True] - {"setuptools", "pip", "pkg_resources"})
    assert {"skimage", "pytest", "torchmetrics"} <= set(foreign)
    names = [f"sr_dist.{name}" for name in modules()]
    code = f"""
import importlib, sys
for name in {foreign!r}:
    sys.modules[name] = None  # importing it raises ImportError
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_of_the_same_name_does_not_hide_the_library(tmp_path: Path) -> None:
    """Such as a clone, seen from the folder above it."""
    (tmp_path / "sr_dist" / "sr_dist").mkdir(parents=True)
    command = [sys.executable, "-c", "import sr_dist; print(sr_dist.load)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "function load" in done.stdout, done.stderr


def test_gathering_and_sharding_pictures_start_without_torch() -> None:
    """Which takes ten times as long to load as all else that they need."""
    names = "archives, dataset, indexing, shard_reader, shard_writer, shards, sources, web"
    code = f"import sys; from sr_dist import {names}; print('torch' in sys.modules)"
    assert succeed(sys.executable, "-c", code).stdout == "False\n"


def test_the_version_is_that_of_the_installed_package() -> None:
    import sr_dist

    assert sr_dist.__version__ == metadata.version("sr_dist")
    assert f"\nversion: {sr_dist.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


@pytest.mark.parametrize("script", ["tests/run.sh", ".ci/run"])
def test_scripts_are_sound_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n", REPOSITORY / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_what_it_needs(tmp_path: Path) -> None:
    """Built, laid into a folder of its own, and used from there, away from this repository."""
    pip = [sys.executable, "-m", "pip"]
    isolated = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY / "sr_dist", source / "sr_dist", ignore=left_out)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    succeed(*pip, "wheel", source, "--no-deps", *isolated, "-w", tmp_path, timeout=200)
    (wheel,) = tmp_path.glob("sr_dist-*.whl")
    succeed(*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel)
    packed = contents(tmp_path / "installed" / "sr_dist")
    held = contents(source / "sr_dist")
    assert {name: packed.get(name) for name in held} == held, "every file of the package is in it"
    assert "py.typed" in packed
    done = succeed(
        *(sys.executable, "-m", "sr_dist"), cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed")
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"sr_dist {metadata.version('sr_dist')}"
    assert any(re.match(r"  CPU, \d+ processors", line) for line in lines)
    assert "  sample   installed" in lines and any("bf16" in line for line in lines)
