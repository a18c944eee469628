"""Compiles kernels for a GPU that need not be there: `compile_for_cuda.py LAUNCHES`.

LAUNCHES (JSON) is a list of `{"module", "kernel", "types", "constants", "num_warps"}`, types as
Triton writes them. Needs a process without Triton's interpreter (TRITON_INTERPRET=0).
"""

import importlib
import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]


def compile_launch(launch: dict) -> None:
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    constants = {places[name]: value for name, value in launch["constants"].items()}
    signature = {name: launch["types"].get(name, "constexpr") for name in kernel.arg_names}
    for target in TARGETS:
        options = {"num_warps": launch["num_warps"]}
        triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)


if __name__ == "__main__":
    for launch in json.loads(Path(sys.argv[1]).read_text()):
        compile_launch(launch)
