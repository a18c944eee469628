"""The command of `scripts/serve.py`, and what is refused before a server starts."""

import os
import socket
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from tiny_models import llama_config, save_byte_tokenizer, save_model
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from harness import serving
from harness.errors import ConfigError
from harness.serving import Server, check_free, parse_server_args, to_words
from repository import ROOT
from scripts import serve
from vllm.ensemble_decode import frontend


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")
    for name in ("first", "second", "third"):
        save_byte_tokenizer(save_model(root / name, llama_config(257), seed=0))
    return root


@pytest.fixture(autouse=True)
def environment(root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_PATH", str(root))
    # Whatever else runs on this machine.
    monkeypatch.setattr(serving, "check_free", lambda address: None)


def server(*words: str) -> Server:
    keys, server_args = serve.split(list(words))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return Server(compose("serve", keys), server_args)


def parsed(command: list[str]) -> Namespace:
    """The command line as vLLM's server reads it."""
    parser = make_arg_parser(FlexibleArgumentParser())
    words = command[2:] if command[0] == "vllm" else command[3:]
    if command[0] == "vllm":
        words = ["--model", *words]
    return parser.parse_args(words)


TURNS = ("method=ensemble_chef", "method.model=first")


def test_vllm_reads_the_command_as_it_was_meant(root):
    made = server(*TURNS, "method.extra_model=[second,third]", "method.gamma=[1,2,3]", "seed=7")
    args = parsed(made.command())
    engine_args = AsyncEngineArgs.from_cli_args(args)
    for name, value in made.engine_args.items():
        found = getattr(engine_args, name)
        found = found[0] if name == "served_model_name" and isinstance(found, list) else found
        assert found == value or str(found) == str(value), name
    assert engine_args.model == str(root / "first")
    assert engine_args.seed == 7
    assert engine_args.additional_config["chef"]["gamma"] == [1, 2, 3]
    # Three members need a limit of a step.
    assert 0 < engine_args.max_num_scheduled_tokens < engine_args.max_num_batched_tokens


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ((), "ensemble_chef-first+second"),
        (("served_model_name=mine",), "mine"),
        (("--", "--served-model-name", "theirs"), "theirs"),
    ],
)
def test_what_is_served_has_a_name(words, name):
    args = parsed(server(*TURNS, "method.extra_model=second", *words).command())
    assert args.served_model_name in (name, [name])


@pytest.mark.parametrize(
    "method",
    ["method=large_model", "method=cd", "method=ensemble_sd", "method=sd"],
)
def test_every_kind_of_method_can_be_served(method):
    others = {
        "cd": ["method.amateur_model=second"],
        "ensemble_sd": ["method.extra_model=second"],
        "sd": ["method.draft_model=second"],
    }.get(method.partition("=")[2], [])
    args = parsed(server(method, "method.model=first", *others).command())
    assert (args.speculative_config is not None) == (method in ("method=ensemble_sd", "method=sd"))


def test_arguments_of_the_server_come_last_and_replace_a_methods_defaults():
    words = ["--max-model-len", "64", "--port", "81", "--api-key", "a b"]
    made = server(*TURNS, "method.extra_model=second", "--", *words)
    assert made.command()[-len(words) :] == words
    assert "max_model_len" not in made.engine_args
    assert parsed(made.command()).max_model_len == 64


def test_engine_arguments_become_words_that_vllm_reads():
    words = to_words(
        {
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "hf_overrides": {"a": "b c"},
            "served_model_name": ["x", "y"],
            "max_num_seqs": 3,
            "quantization": None,
        }
    )
    found = parse_server_args(words).engine_args
    assert found == {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "hf_overrides": {"a": "b c"},
        "served_model_name": ["x", "y"],
        "max_num_seqs": 3,
    }


BAD = {
    "--port 80": "'--port' is no key; arguments of vLLM's server stand behind --",
    "method=cd port": "'port' is not of the form key=value",
    "method=cd method.generate.temperature=1": "method.generate.temperature: each request brings",
    "method=cd seed=-1": "seed: -1 must be an integer from 0",
    "method=cd served_model_name=[a]": "served_model_name: ['a'] is no name",
    "method=cd method.amateur_model=no-such-model": "method.amateur_model: ",
    "method=cd method.alpha=2": "method.alpha: 2 is out of range",
    "method=ensemble_chef method.gamma=0": "method.gamma: 0 is out of range",
    "method=cd -- --no-such-flag": "arguments of vLLM's server: unrecognized arguments: --no-such",
    "method=cd -- --port x": "arguments of vLLM's server: argument --port: invalid int value",
    "method=cd -- --worker-cls x": "--worker-cls: the method sets it; leave it out",
    "method=ensemble_chef -- --max-num-batched-tokens 3": "--max-num-batched-tokens: ",
    "method=ensemble_chef method.llm.max_num_batched_tokens=3": "method.llm.max_num_batched_",
    "method=ensemble_chef -- --pipeline-parallel-size 2": "--pipeline-parallel-size: ",
    "method=cd -- --tool-call-parser": "arguments of vLLM's server: argument --tool-call-parser",
    'method=cd -- --structured-outputs-config {"x":1}': "arguments of vLLM's server: argument ",
    "method=cd -- --enable-auto-tool-choice": "arguments of vLLM's server: ",
}


@pytest.mark.parametrize(("words", "message"), BAD.items())
def test_bad_input_is_one_line_that_names_what_was_typed(words, message):
    words = words.split()
    at = words.index("--") if "--" in words else len(words)
    others = {
        "method=cd": ["method.model=first", "method.amateur_model=second"],
        "method=ensemble_chef": ["method.model=first", "method.extra_model=second"],
    }.get(words[0], [])
    with pytest.raises(ConfigError) as error:
        server(words[0], *others, *words[1:at], *words[at:])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_cpu", [False, True])
def test_the_script_prints_the_command_and_runs_it(is_cpu, monkeypatch, capsys):
    monkeypatch.setattr(serving, "is_cpu_build", lambda: is_cpu)
    monkeypatch.setattr(sys, "argv", ["serve.py", *TURNS, "method.extra_model=second"])
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    became = []
    monkeypatch.setattr(os, "execve", lambda *args: became.append(args))
    serve.serve()
    ((path, words, environment),) = became
    printed = capsys.readouterr().out
    first = "python -m vllm.entrypoints.openai.api_server --model " if is_cpu else "vllm serve "
    assert printed.startswith(first)
    assert path == words[0] == sys.executable
    at = words.index(str(ROOT / "harness/supervisor.py"))
    seconds, program = words[at + 1 : at + 3]
    assert int(seconds) == serving.MORE_S
    assert program == (sys.executable if is_cpu else str(Path(sys.executable).with_name("vllm")))
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"


def test_the_server_gets_the_time_that_its_requests_get():
    made = server(*TURNS, "method.extra_model=second", "--", "--shutdown-timeout", "12")
    assert made.seconds_to_end == 12 + serving.MORE_S


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("--port {taken}", "--port: {taken} cannot be used (Address already in use); choose"),
        ("--port 70000", "--port: 70000 is no port; choose one below 65536"),
        ("--port 0 --host 192.0.2.77", "--port: 0 cannot be used (Cannot assign requested"),
        ("--port 0 --host no.such.host.invalid", "--host: 'no.such.host.invalid' is no address"),
    ],
)
def test_an_address_that_cannot_be_used_is_told_in_one_line(asked, line, monkeypatch):
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        words = asked.format(taken=taken).split()
        with pytest.raises(ConfigError) as caught:
            check_free(parse_server_args(["--host", "127.0.0.1", *words]).address)
    assert str(caught.value).startswith(line.format(taken=taken))
    assert "\n" not in str(caught.value)


def test_a_socket_of_the_file_system_is_no_port():
    assert parse_server_args(["--uds", "/tmp/none"]).address is None
    check_free(None)


# The front end of `vllm serve` and of `LLM`


def engine_with(worker_cls: str) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(worker_cls=worker_cls))


@pytest.mark.parametrize("package", frontend.CHECKS)
def test_the_front_end_makes_the_workers_check(package, monkeypatch):
    module, _, name = frontend.CHECKS[package].rpartition(".")
    checked = []
    monkeypatch.setattr(sys.modules[module], name, checked.append)
    config = engine_with(f"{package}worker.Worker")
    frontend.check_engine(config)
    assert checked == [config]
