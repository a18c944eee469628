"""The command that serves a method, with every possible check before vLLM's server starts.

This module knows the command line of vLLM's server.
"""

import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from omegaconf import DictConfig, OmegaConf

from harness.checks import check_groups, check_known, check_seed
from harness.engine import configure_process
from harness.engine_config import make_engine_config
from harness.errors import ConfigError, one_line
from harness.methods import MethodSpec, make_spec
from repository import ROOT
from triton_cpu_interpreter import is_cpu_build

KEYS = ("method", "served_model_name", "seed")
NAME = "served_model_name"
# vLLM makes room for its own default, which is smaller.
MANY = 1 << 16
# To close what is open, after the time in which vLLM lets requests finish.
MORE_S = 15


class Server:
    """A method and the further arguments of its server, checked.

    Args:
        config: the keys of `configs/serve.yaml`.
        server_args: words for the command line of `vllm serve`.

    Raises:
        ConfigError: one line that names the key or the argument.
    """

    def __init__(self, config: DictConfig, server_args: Sequence[str]) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        check_known(plain, KEYS)
        check_groups(plain, ("method", "method.generate", "method.llm"))
        check_seed(plain["seed"])
        method, name = plain["method"], plain[NAME]
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigError(f"{NAME}: {name!r} is no name; give a text, or null")
        for key, value in method["generate"].items():
            if value is not None:
                raise ConfigError(
                    f"method.generate.{key}: each request brings its own sampling parameters; "
                    "leave it out, or set the server's defaults behind -- with "
                    "--override-generation-config"
                )
        configure_process(verbose=False)
        spec = make_spec(method)
        parsed = parse_server_args(server_args)
        given = parsed.engine_args
        for argument in sorted({"model", *spec.engine_args} & given.keys()):
            if argument not in _MAY_BE_REPLACED:
                raise ConfigError(f"{_flag(argument)}: the method sets it; leave it out")
        check_free(parsed.address)
        ours = {NAME: name or default_name(spec), "seed": plain["seed"], **spec.engine_args}
        ours |= _limits(replace(spec, engine_args={**ours, **given}), given)
        self.seconds_to_end = given.get("shutdown_timeout", 0) + MORE_S
        self.engine_args = {key: value for key, value in ours.items() if key not in given}
        self.server_args = list(server_args)
        self.spec = spec

    def command(self) -> list[str]:
        """The command and its arguments; its first word is found beside this Python."""
        words = to_words({k: v for k, v in self.engine_args.items() if k != "model"})
        model = self.engine_args["model"]
        # The `vllm` command does not start with vLLM's CPU build.
        if is_cpu_build():
            start = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        else:
            start = ["vllm", "serve", model]
        return [*start, *words, *self.server_args]

    def supervised_command(self) -> list[str]:
        """The same below a supervisor, which ends the server in bounded time."""
        supervisor = ["-I", str(ROOT / "harness/supervisor.py"), str(self.seconds_to_end)]
        first, *others = self.command()
        return [sys.executable, *supervisor, program(first), *others]


# What a method sets as a default for a platform only.
_MAY_BE_REPLACED = ("dtype", "enforce_eager", "kv_cache_memory_bytes", "max_model_len")


def _limits(spec: MethodSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the whole configuration. Returns the limits of a step that turns need."""
    from vllm.chef.arguments import step_limits

    with _errors_of_flags(given):
        config = make_engine_config(spec, spec.engine_args["seed"], MANY)
    return step_limits(spec.engine_args, config, spec.turns)


class ServerArgs(NamedTuple):
    """Of the command line of `vllm serve`.

    Args:
        engine_args: those that are given, by name.
        address: host and port. None: the server listens at a Unix socket.
    """

    engine_args: dict[str, Any]
    address: tuple[str, int] | None


def parse_server_args(server_args: Sequence[str]) -> ServerArgs:
    """Read words of `vllm serve`'s command line.

    Raises:
        ConfigError: vLLM's server would refuse the command line.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    # Otherwise the parser prints its usage and exits.
    parser.error = _refuse
    defaults, parsed = vars(parser.parse_args([])), parser.parse_args(list(server_args))
    try:
        validate_parsed_serve_args(parsed)
        validate_api_server_args(parsed)
    except KeyError as error:
        _refuse(str(error.args[0]))
    except Exception as error:  # each of vLLM's checks raises what it likes
        _refuse(str(error))
    names = EngineArgs.__dataclass_fields__
    given = {k: v for k, v in vars(parsed).items() if k in names and v != defaults[k]}
    return ServerArgs(given, None if parsed.uds else (parsed.host or "", parsed.port))


def check_free(address: tuple[str, int] | None) -> None:
    """Refuse an address at which the server could not listen.

    Raises:
        ConfigError: one line that names the argument.
    """
    if address is None:
        return
    host, port = address
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port: {port} is no port; choose one below {1 << 16}")
    try:
        family, kind, _, _, found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as server:
            # As vLLM's server does it, so that the port of a server that has just ended is free.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(found)
            server.listen()
    except socket.gaierror as error:
        raise ConfigError(
            f"--host: '{host}' is no address of this machine ({error.strerror})"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"--port: {port} cannot be used ({error.strerror}); choose another"
        ) from error


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"arguments of vLLM's server: {one_line(ValueError(message))}")


@contextlib.contextmanager
def _errors_of_flags(given: Mapping[str, Any]) -> Iterator[None]:
    """Name an argument as the user typed it: behind `--`, and not as a key of the method."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for name in given:
            text = re.sub(rf"method\.llm\.{name}\b", _flag(name), text)
        raise ConfigError(text) from error


def to_words(engine_args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as words of `vllm serve`'s command line. None is left out."""
    words: list[str] = []
    for name, value in engine_args.items():
        flag = _flag(name)
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, Mapping):
            words += [flag, json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def default_name(spec: MethodSpec) -> str:
    """Such as `ensemble_chef-smollm2-135m+smollm2-python`."""
    return f"{spec.name}-{'+'.join(Path(member).name for member in spec.members)}"


def program(word: str) -> str:
    """The path of a command's first word. It belongs to the Python that runs."""
    return sys.executable if word == "python" else str(Path(sys.executable).with_name(word))
