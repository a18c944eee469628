"""Installing ./vllm adds our packages to a stock vLLM, wherever Python starts, and leaves no trace.

pip makes each installation for real, in a venv of its own. The venv shares torch and the rest with
the environment that runs the tests, because the installation does not touch them. The stock `vllm`
must be a copy, because the installation writes into that folder. Nothing here uses the network.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
from quick import quick

from repository import ROOT

DISTRIBUTION = ROOT / "vllm"
OUR_PACKAGES = ("chef", "cpu_kernels", "ensemble_decode")

# Prints what a process finds, and what a process finds that it spawned, as vLLM spawns workers.
PROBE = """
import json
import multiprocessing

def find():
    import vllm
    import vllm.ensemble_decode
    from importlib.metadata import entry_points
    return {
        "version": vllm.__version__,
        "stock": vllm.__file__,
        "ours": vllm.ensemble_decode.__file__,
        "plugins": [e.value for e in entry_points(group="vllm.general_plugins", name="chef")],
        "backends": [e.value for e in entry_points(group="triton.backends", name="cpu")],
    }

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply_async(find)
        print(json.dumps([find(), spawned.get()]))
"""


class Installation(NamedTuple):
    root: Path  # a copy of the parts of the repository that matter here
    python: Path
    site_packages: Path
    editable: bool


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def copy_stock_vllm(site_packages: Path) -> None:
    stock = Path(importlib.util.find_spec("vllm").origin).parent
    shutil.copytree(
        stock,
        site_packages / "vllm",
        copy_function=link_or_copy,
        ignore=lambda folder, _: OUR_PACKAGES if Path(folder) == stock else (),
    )


def pip(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", *arguments]
    # One stream of pip's output, so that a failure shows all of it.
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


def probe(installation: Installation, folder: Path) -> list[dict]:
    """Run PROBE as a script in `folder`, as main_dataset.py runs in the repo root."""
    script = folder / "probe.py"
    script.write_text(PROBE)
    result = subprocess.run(
        [installation.python, script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def list_stock(site_packages: Path) -> set[str]:
    files = (site_packages / "vllm").rglob("*")
    return {str(file) for file in files if file.is_file() and "__pycache__" not in file.parts}


@pytest.fixture(scope="module", params=quick(["normal", "editable"]))
def installation(request, tmp_path_factory) -> Installation:
    folder = tmp_path_factory.mktemp(request.param)
    root = folder / "repo"
    # A copy, because a build leaves files in the folder that it builds.
    ignore = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(DISTRIBUTION, root / "vllm", ignore=ignore)

    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    # This path comes after the venv's own folder on sys.path. Its .pth files do not run. So this
    # project's own editable installation, which the tests use, is not visible.
    shared = sysconfig.get_paths()["purelib"]
    (site_packages / "shared.pth").write_text(f"{shared}\n")
    copy_stock_vllm(site_packages)
    before = list_stock(site_packages)

    editable = request.param == "editable"
    # setuptools is the shared one. Whatever is missing must fail and not be fetched.
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    pip(python, "install", *options, *(["--editable"] if editable else []), str(root / "vllm"))
    yield Installation(root, python, site_packages, editable)

    pip(python, "uninstall", "--yes", "speculative-ensemble")
    assert list_stock(site_packages) == before
    left = [site_packages / "vllm" / name for name in OUR_PACKAGES]
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize("place", ["repo root", "elsewhere"])
def test_packages_join_the_stock_one(installation, place, tmp_path):
    folder = installation.root if place == "repo root" else tmp_path
    ours = installation.root / "vllm" if installation.editable else installation.site_packages
    for found in probe(installation, folder):
        assert found["version"].startswith("0.32.0")
        assert found["stock"] == str(installation.site_packages / "vllm" / "__init__.py")
        assert found["ours"] == str(ours / "vllm" / "ensemble_decode" / "__init__.py")
        assert found["plugins"] == ["vllm.chef:register"]
        assert found["backends"] == ["triton_cpu_interpreter"]


def test_every_module_is_installed(installation):
    """An editable installation would still find a package that `packages.find` misses."""
    if installation.editable:
        pytest.skip("maps folders, copies nothing")
    sources = installation.root / "vllm"
    for package in (*(f"vllm/{name}" for name in OUR_PACKAGES), "triton_cpu_interpreter"):
        modules = {str(file.relative_to(sources)) for file in (sources / package).rglob("*.py")}
        assert modules, package
        missing = [name for name in modules if not (installation.site_packages / name).exists()]
        assert not missing


def test_nothing_hides_the_stock_package():
    """With an `__init__.py` in these folders, `import vllm` from the repo root would be ours."""
    assert not (DISTRIBUTION / "__init__.py").exists()
    assert not (DISTRIBUTION / "vllm" / "__init__.py").exists()
