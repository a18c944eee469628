"""Serves a method with vLLM's OpenAI-compatible server.

    python scripts/serve.py [key=value ...] [-- arguments of `vllm serve`]
    python scripts/serve.py method=ensemble_chef method.model=EXPERT method.extra_model=OTHER
    python scripts/serve.py method=cd_chef method.gamma=5 served_model_name=cd -- --port 8000

The keys are those of `main_dataset.py`, with `served_model_name` and `seed` (`configs/serve.yaml`).
The script checks everything, prints the command that it stands for, and runs it. It ends with
status 0 only if it was asked to end (SIGTERM, Ctrl-C).
"""

import os
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks for modules beside the program that it starts. They are one folder up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hydra import compose, initialize_config_dir

from harness.command import call
from harness.errors import ConfigError
from harness.serving import Server
from repository import ROOT

SEPARATOR = "--"


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Keys of the configuration, and arguments of vLLM's server.

    Raises:
        ConfigError: an argument before `--` is no key with a value.
    """
    at = arguments.index(SEPARATOR) if SEPARATOR in arguments else len(arguments)
    keys, server_args = arguments[:at], arguments[at + 1 :]
    for argument in keys:
        if argument.startswith("-"):
            raise ConfigError(
                f"'{argument}' is no key; arguments of vLLM's server stand behind --, as in "
                f"-- {argument}"
            )
        if "=" not in argument and not argument.startswith("~"):
            raise ConfigError(f"'{argument}' is not of the form key=value; see configs/serve.yaml")
    return keys, server_args


def serve() -> None:
    # The checks set variables for their own process. The server gets those of before.
    environment = dict(os.environ)
    try:
        keys, server_args = split(sys.argv[1:])
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("serve", keys)
        server = Server(config, server_args)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(shlex.join(server.command()), flush=True)
    # This process has imported much that only the checks needed.
    os.execve(sys.executable, server.supervised_command(), environment)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
    else:
        call(serve, "no server was started")
