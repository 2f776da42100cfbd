"""The files of launch/, as far as they can be tried without a cluster."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from sr_dist import distributed
from sr_dist.errors import UserError
from tests.helpers import (
    REPOSITORY,
    all_end,
    contents,
    end_ranks,
    free_port,
    popen,
    run,
    start,
    succeed,
)
from tests.runs import ONE_PROCESS, TWO_PROCESSES, launch, rows, saved

LAUNCH = REPOSITORY / "launch"
ACCELERATE_FILES = sorted((LAUNCH / "accelerate").glob("*.yaml"))
# srun: starts the tasks, with the variables of Slurm, and ends with the highest status.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$STUBS/options"; shift; done
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  echo $! >> "$STUBS/ranks"
done
worst=0
for rank in $(jobs -p); do wait "$rank"; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo other; else echo "$@" >> "$STUBS/said"; fi
"""


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=lambda path: path.stem)
def test_accelerate_reads_each_file_and_its_comment_says_how(path: Path) -> None:
    known = load_config_from_file(str(path)).to_dict()
    given = yaml.safe_load(path.read_text())
    for key, value in given.items():
        assert str(getattr(known[key], "value", known[key])) == str(value), key
    (command, *_) = re.findall(r"^#   (accelerate launch .*)$", path.read_text(), re.MULTILINE)
    words = command.split()
    assert words[words.index("--config_file") + 1] == f"launch/accelerate/{path.name}"
    recipe = words[words.index("--config") + 1]
    assert (REPOSITORY / recipe).is_file() and "launch/train.py" in words


def test_the_file_for_one_gpu_starts_on_what_is_here(recipe: Path) -> None:
    path = LAUNCH / "accelerate" / "single_gpu.yaml"
    words = ("--config_file", path, LAUNCH / "train.py", "--config", recipe, "--dry-run")
    done = succeed("accelerate", "launch", *words)
    assert re.search(r"1 process on (cpu|cuda), precision no; ", done.stderr)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("path", "ranks"), [(ONE_PROCESS, 1), (TWO_PROCESSES, 2)])
def test_the_files_for_the_cpu_use_it_where_there_are_gpus(
    path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = launch(path, "tests/workers/which_device.py")
    assert done.returncode == 0, done.stderr
    expected = [f"rank {rank} of {ranks}: cpu" for rank in range(ranks)]
    assert sorted(line for line in done.stdout.splitlines() if "rank" in line) == expected
    assert "no GPU can be used" not in done.stderr, "what was asked for needs no warning"


def test_who_asks_for_the_cpu_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("ACCELERATE_USE_CPU", "no"), ("CUDA_VISIBLE_DEVICES", "0,1")):
        monkeypatch.setenv(name, value)
        assert not distributed.told_cpu()
    for value in ("", "-1", "-1,-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert distributed.told_cpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not distributed.told_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert distributed.told_cpu()
    with (
        pytest.raises(UserError, match="fp16 needs a GPU, and the launcher was told to use the C"),
        distributed.joined("fp16", seed=0),
    ):
        pass


def test_an_interpreter_may_compute_in_one_precision_after_another() -> None:
    for precision in ("no", "bf16", "no"):
        with distributed.joined(precision, seed=0) as processes:
            assert processes.mixed_precision == precision
            with processes.autocast():
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.multiprocess
def test_the_file_for_several_machines_trains_on_two_launchers(
    recipe: Path, tmp_path: Path
) -> None:
    """On the CPU of this one machine: a process each."""
    values = yaml.safe_load((LAUNCH / "accelerate" / "multi_node.yaml").read_text())
    assert (values["num_machines"], values["num_processes"]) == (2, 16)
    values |= {"use_cpu": True, "gpu_ids": "-1", "num_processes": 2, "mixed_precision": "no"}
    values["main_process_port"] = free_port()
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    options = ("--config_file", tmp_path / "two.yaml", "--main_process_ip", "127.0.0.1")
    words = (LAUNCH / "train.py", "--config", recipe, "train.epochs=1")
    machines = [
        start("accelerate", "launch", *options, "--machine_rank", rank, *words) for rank in (0, 1)
    ]
    ended = end_ranks(machines, timeout=200)
    assert [done.returncode for done in ended] == [0, 0], [done.stderr for done in ended]
    assert saved(tmp_path / "runs" / "small")[1]["world_size"] == 2


@pytest.mark.parametrize("name", ["slurm.sbatch", "make_shards.sbatch", "quickstart.sh"])
def test_scripts_are_sound(name: str) -> None:
    succeed("bash", "-n", LAUNCH / name)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not here")
    succeed("shellcheck", "--exclude=SC1091", LAUNCH / name)


def test_the_quickstart_says_what_to_do_with_the_run_that_it_made(tmp_path: Path) -> None:
    """Its training is a stand-in that leaves the configuration and says where."""
    for folder in ("launch", "tools", "configs"):
        (tmp_path / folder).mkdir()
    for name in ("launch/quickstart.sh", "configs/quickstart.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "launch" / "environment.sh").write_text('cd "$(dirname "$0")/.."\n')
    for name in ("make_dataset.py", "split_dataset.py", "make_shards.py"):
        (tmp_path / "tools" / name).touch()
    (tmp_path / "launch" / "train.py").write_text("""
import pathlib, sys
from sr_dist import config
if "--dry-run" not in sys.argv:
    settings = config.load(sys.argv[2], sys.argv[3:])
    folder = pathlib.Path(settings.run.output_dir, settings.run.name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    print(f"the table\\n\\nRun folder: {folder}")
""")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def said(*words: str) -> str:
        script = tmp_path / "launch" / "quickstart.sh"
        return succeed("bash", script, *words, PATH=path, PYTHONPATH=str(REPOSITORY)).stdout

    without = said()
    assert without.startswith("the table\n") and "--checkpoint runs/quickstart --input" in without
    assert "The content loss was left off" in without
    (command,) = re.findall(r"^  bash launch/quickstart.sh (.*)$", without, re.MULTILINE)
    with_it = said(*command.split(), "run.output_dir=elsewhere")
    assert "content loss" not in with_it and "runs/" not in with_it
    assert with_it.count("elsewhere/quickstart_content") == 4 and "--logdir elsewhere " in with_it
    assert said("--dry-run") == ""
    (tmp_path / "launch" / "train.py").write_text("raise SystemExit(2)")
    assert run("bash", tmp_path / "launch" / "quickstart.sh", PATH=path).returncode == 2


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with stubs of Slurm's commands and this Python before others."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    path = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "STUBS": str(stubs)}


@pytest.mark.multiprocess
def test_a_slurm_job_trains_and_goes_back_into_the_queue(
    recipe: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    slurm["SLURM_CPUS_PER_TASK"] = "3"
    slurm |= {
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    job = ["bash", str(LAUNCH / "slurm.sbatch"), "--config", str(recipe)]
    folder, stubs = tmp_path / "runs" / "small", Path(slurm["STUBS"])
    with popen([*job, "train.epochs=300"], cwd=REPOSITORY, env=slurm) as running:
        deadline = time.monotonic() + 150
        while not (folder / "logs").exists():  # the end of the first epoch
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.2)
        ranks = (stubs / "ranks").read_text().split()
        for rank in ranks:
            assert b"\0LOCAL_WORLD_SIZE=2\0" in Path(f"/proc/{rank}/environ").read_bytes()
        for rank in ranks:  # as --signal=USR1@120 does
            os.kill(int(rank), signal.SIGUSR1)
        assert running.wait(60) == 75
    options = (stubs / "options").read_text().splitlines()
    assert options == ["--kill-on-bad-exit=0", "--cpus-per-task=3"]
    assert (stubs / "said").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    _, meta = saved(folder)
    assert meta["world_size"] == 2 and meta["step"] >= 18  # type: ignore[operator]
    epochs = meta["step"] // 18 + 1  # type: ignore[operator]
    slurm["SLURM_NTASKS"] = "1"
    done = subprocess.run([*job, f"train.epochs={epochs}"], cwd=REPOSITORY, env=slurm, timeout=200)
    assert done.returncode == 0 and len(rows(folder)) == epochs
    assert len((stubs / "said").read_text().splitlines()) == 1


@pytest.mark.multiprocess
def test_an_array_job_writes_the_shards_of_one_machine(
    photographs: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    options = ["--images", photographs, "--tile", "64", "--samples-per-shard", "40"]
    succeed("tools/make_shards.py", *options, "--output", tmp_path / "one", "--workers", 1)
    slurm |= {"SLURM_ARRAY_JOB_ID": str(free_port()), "SLURM_ARRAY_TASK_MIN": "3"}
    slurm["SLURM_CPUS_PER_TASK"] = "1"
    job = ["bash", str(LAUNCH / "make_shards.sbatch"), *map(str, options)]
    job += ["--output", str(tmp_path / "many")]
    tasks = [
        subprocess.Popen(
            job,
            cwd=REPOSITORY,
            env={**slurm, "SLURM_ARRAY_TASK_ID": number},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ("3", "4")
    ]
    all_end(tasks, timeout=150)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not list(REPOSITORY.glob(".dask-*.json"))


def test_an_array_job_without_dask_fails(tmp_path: Path, slurm: dict[str, str]) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "seq", "sleep", "rm"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    slurm |= {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_ID": "0"}
    slurm["PATH"] = str(tmp_path / "bin")
    job = ["bash", str(LAUNCH / "make_shards.sbatch"), "--output", str(tmp_path / "out")]
    done = subprocess.run(job, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "dask is not installed: pip install -e" in done.stderr


def test_the_kubernetes_file_is_of_the_published_schema() -> None:
    """Kubeflow's objects come back from its own types as they were: they know all that is in it."""
    kubeflow = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed"
    )
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents) == 5

    def check(kind: str, value: dict[str, Any]) -> None:
        assert getattr(kubeflow, kind).from_dict(value).to_dict() == value, kind

    check("TrainerV1alpha1TrainJob", found["TrainJob"])
    check("TrainerV1alpha1TrainingRuntime", found["TrainingRuntime"])
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for kind in ("PersistentVolumeClaim", "Deployment", "Service"):
        kubernetes.validate(found[kind], kubernetes.latest_version(), strict=True)
    (node,) = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    job = node["template"]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    trainer = found["TrainJob"]["spec"]["trainer"]
    assert (REPOSITORY / trainer["args"][0]).is_file()
    assert (REPOSITORY / trainer["args"][2]).is_file()
    claims = re.findall(r"claimName: ([\w-]+)", (LAUNCH / "kubernetes.yaml").read_text())
    assert set(claims) == {found["PersistentVolumeClaim"]["metadata"]["name"]}


def test_the_image_holds_what_is_there() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert set(copied) >= {"sr_dist", "launch", "configs", "tools", "setup.cfg"}
    for name in copied:
        assert (REPOSITORY / name).exists(), name


def test_the_table_of_efficiencies_follows_from_its_formula() -> None:
    page = (LAUNCH / "README.md").read_text()
    links = {"NVLink": (400e9, 5e-6), "100 GbE": (12.5e9, 20e-6)}
    generator, crops = 200_121, 16
    # Numbers, those of the weight whose factors may be sent, numbers of a row of these.
    heads = {
        "linear": (19_413_279, 18_432 * 1024, 18_432 + 1024),
        "gap": (1_063_199, 512 * 1024, 512 + 1024),
    }
    checked = 0
    for link, head, compressed, *cells in re.findall(
        r"^\| (NVLink|100 GbE), (linear|gap)(, `gradient_compression: bf16`)? \| "
        r"([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$",
        page,
        re.MULTILINE,
    ):
        (bandwidth, latency), (numbers, weight, row) = links[link], heads[head]
        for ranks, cell in zip((8, 64, 512), cells, strict=True):
            factored = ranks * crops * row < weight
            size = (generator + numbers - factored * weight) * (2 if compressed else 4)
            sent = 2 * (ranks - 1) / ranks * size / bandwidth
            sent += factored * (ranks - 1) * 2 * crops * row * 4 / bandwidth
            sent += (4 if factored else 3) * 2 * math.log2(ranks) * latency
            assert float(cell) == pytest.approx(100 * 0.02 / (0.02 + sent), abs=0.051)
            checked += 1
    assert checked == 15
