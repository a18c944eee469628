"""Whatever is in the YAML or on the command line: a run, or one line, and nothing half-written.

A run here ends where it would load weights. What is found is made a test of its own elsewhere.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fuzzing import FLAGS, OF_VLLM, TEXTS, UNKNOWN, leaves, values
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from tiny_models import llama_config, save_byte_tokenizer, save_model

import harness.run
import main_dataset
from harness import serving
from harness.errors import ConfigError
from harness.session import Session
from repository import ROOT

METHODS = {
    "large_model": (),
    "sd": ("method.draft_model=b",),
    "cd": ("method.amateur_model=b",),
    "cd_sd": ("method.amateur_model=b",),
    "cd_chef": ("method.amateur_model=b", "method.gamma=auto"),
    "ensemble": ("method.extra_model=b", "method.draft_model=c", "method.gamma=2"),
    "ensemble_sd": ("method.extra_model=b",),
    "ensemble_chef": ("method.extra_model=[b,c]",),
}
ROWS = [{"question": f"What is 1 + {n}?", "answer": f"#### {1 + n}"} for n in (1, 2)]
# The key or the argument that the user typed, then what is wrong.
LINE = re.compile(r"(--)?[a-z][\w.-]*(/[\w.]+)*( of vLLM's server)?(=.*?)?: .+")


class LoadsWeights(Exception):
    """The checks are over."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for seed, name in enumerate("abc"):
        config = llama_config(257, layers=1, max_position_embeddings=512)
        save_byte_tokenizer(save_model(root / "models" / name, config, seed=seed))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "empty").mkdir()
    return root


@pytest.fixture(autouse=True)
def prepared(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(session: Session) -> None:
        raise LoadsWeights

    monkeypatch.setenv("MODEL_PATH", str(root / "models"))
    monkeypatch.chdir(root / "empty")
    monkeypatch.setattr(Session, "start", load)
    monkeypatch.setattr(serving, "check_free", lambda address: None)
    # One line of the log for each wrong value would fill the report of a failure.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)


def made(name: str, root: Path) -> dict[str, DictConfig]:
    """The configurations of all methods, for an entry point whose configuration is `name`."""
    more = [f"dataset.path={root / 'rows.jsonl'}", "dataset.name=gsm8k", "save_path=out"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return {
            method: compose(
                name,
                [f"method={method}", "method.model=a", *keys, *(more if name == "default" else ())],
            )
            for method, keys in METHODS.items()
        }


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, DictConfig]:
    return made("default", root)


@pytest.fixture(scope="module")
def servers(root: Path) -> dict[str, DictConfig]:
    return made("serve", root)


def assert_ends_well(job: Callable[[], Any], root: Path) -> None:
    try:
        job()
    except LoadsWeights:
        pass
    except ConfigError as error:
        assert LINE.fullmatch(str(error)), str(error)
    assert not os.listdir(root / "empty"), "something is written"


def changed(config: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    """As a YAML file could have it."""
    config = config.copy()
    for key, value in changes.items():
        try:
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        except Exception:  # the group of this key has become another value
            hypothesis.reject()
    return config


def keys_of(configs: Mapping[str, DictConfig]) -> list[str]:
    plain = (OmegaConf.to_container(config, resolve=False) for config in configs.values())
    return sorted({key for config in plain for key in leaves(config)})


def examples(number: int, is_fixed: bool) -> Callable[[Any], Any]:
    return hypothesis.settings(
        max_examples=number,
        derandomize=is_fixed,
        database=None,
        deadline=timedelta(seconds=5),
        suppress_health_check=[*HealthCheck],
    )


# Few in the quick set, always the same; many others in the slow one.
AMOUNTS = [
    pytest.param(60, True, id="few"),
    pytest.param(1500, False, id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("method", "changes", "line"),
    [
        (
            "ensemble",
            {"method.llm.max_num_seqs": "x"},
            "method.llm.max_num_seqs: 'x' must be an int",
        ),
        ("sd", {"method.llm.enforce_eager": 1.5}, "method.llm.enforce_eager: 1.5 must be true or"),
        ("cd_chef", {"method.llm.max_model_len": 0}, "method.llm.max_model_len: "),
        ("cd", {"method.llm.speculative_config": 64}, "method.llm.speculative_config: 64 does not"),
        ("cd", {"method.generate.stop": 0}, "method.generate.stop: vLLM does not take 0"),
        ("cd", {"method.name": None}, "method: this is no method; choose one of large_model"),
        ("ensemble", {"method.name": ["cd"]}, "method: unknown method ['cd']; choose one of"),
        ("ensemble", {"dataset.name": {"a": 1}}, "dataset.name={'a': 1} is not a task: known"),
        (
            "large_model",
            {"method.llm.reasoning_parser": "x"},
            "method.llm: KeyError: Reasoning parser",
        ),
    ],
)
def test_what_was_found_stays_found(method, changes, line, runs):
    config = changed(runs[method], changes)
    with pytest.raises(ConfigError) as caught:
        harness.run.run(config, config.save_path)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "word",
    [
        "method.llm.ensemble_args={plausibility: 0.5}",
        "+method.llm.ensemble_args={plausibility: 0.5}",
        "+method.llm.ensemble_args.plausibility=0.5",
    ],
)
def test_parameters_of_a_function_are_set_in_three_ways(word, root):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        words = ["method=cd", "method.model=a", "method.amateur_model=b", word]
        config = compose("default", [*words, "method.llm.ensemble_fn=contrastive_plausible"])
    prepared = Session.prepare(OmegaConf.to_container(config.method), 0, 1)
    ensemble = prepared.engine_config.additional_config["ensemble"]
    assert ensemble["ensemble_args"] == {"plausibility": 0.5}


@pytest.mark.parametrize("key", ["method.amateur_model", "method.llm", "dataset", "seed"])
def test_a_key_that_is_missing_is_named(key, runs):
    config = runs["cd"].copy()
    group, _, name = key.rpartition(".")
    OmegaConf.set_struct(config, False)
    del (OmegaConf.select(config, group) if group else config)[name]
    with pytest.raises(ConfigError, match=f"^{key}: "):
        harness.run.run(config, config.save_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--enable-auto-tool-choice --tool-call-parser x",
            "arguments of vLLM's server: invalid to",
        ),
        ("--chat-template x.jinja", "arguments of vLLM's server: The supplied chat template"),
        ("--speculative-config 64", "--speculative-config: 64 "),
    ],
)
def test_what_was_found_of_servers_stays_found(words, line, servers):
    with pytest.raises(ConfigError) as caught:
        serving.Server(servers["cd"], words.split())
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(("number", "is_fixed"), AMOUNTS)
def test_a_wrong_configuration_is_told_in_one_line(number, is_fixed, runs, root):
    keys = st.sampled_from([*keys_of(runs), *OF_VLLM, *UNKNOWN])

    @examples(number, is_fixed)
    @given(
        method=st.sampled_from([*METHODS]),
        changes=st.dictionaries(keys, values, min_size=1, max_size=2),
    )
    def check(method: str, changes: dict[str, Any]) -> None:
        config = changed(runs[method], changes)
        if isinstance(changes.get("save_path"), str) and changes["save_path"]:
            hypothesis.reject()  # a folder
        assert_ends_well(lambda: harness.run.run(config, config.save_path), root)

    Session.prepare(OmegaConf.to_container(runs["cd"].method), 0, 1)  # imports take long
    check()


@pytest.mark.parametrize(("number", "is_fixed"), AMOUNTS)
def test_a_wrong_server_is_told_in_one_line(number, is_fixed, servers, root, capsys):
    keys = st.sampled_from([*keys_of(servers), *OF_VLLM, *UNKNOWN])
    words = st.lists(st.sampled_from(FLAGS) | st.sampled_from(TEXTS), max_size=3)

    @examples(number, is_fixed)
    @given(
        method=st.sampled_from([*METHODS]),
        changes=st.dictionaries(keys, values, max_size=1),
        words=words,
    )
    def check(method: str, changes: dict[str, Any], words: list[str]) -> None:
        config = changed(servers[method], changes)
        assert_ends_well(lambda: serving.Server(config, words).command(), root)

    serving.Server(servers["ensemble"], []).command()
    check()


@pytest.mark.parametrize(("number", "is_fixed"), AMOUNTS)
def test_wrong_words_of_a_command_line_are_told_in_one_line(
    number, is_fixed, runs, root, monkeypatch, capsys
):
    """What Hydra makes of them, or refuses."""
    given_keys = ["method.model=a", f"dataset.path={root / 'rows.jsonl'}", "dataset.name=gsm8k"]
    keys = st.sampled_from([*keys_of(runs), "method", "=", "+", "~method.gamma"])
    word = st.tuples(st.sampled_from(["", "+", "++", "~"]), keys, st.sampled_from(TEXTS))

    # Hydra takes a second for each.
    @examples(15 if is_fixed else 60, is_fixed)
    @given(words=st.lists(word, min_size=1, max_size=2))
    def check(words: list[tuple[str, str, str]]) -> None:
        typed = [f"{sign}{key}={text}" for sign, key, text in words if key != "save_path"]
        argv = ["main_dataset.py", *given_keys, "save_path=out", *typed]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            main_dataset.main()
        except SystemExit as error:
            # Hydra's parser of arguments has told its own line and exits with 2.
            if error.code != 2:
                assert re.fullmatch(r"error: [^\n]+", str(error.code)), error.code
        except LoadsWeights:
            pass
        assert not os.listdir(root / "empty"), "something is written"

    monkeypatch.setattr("harness.command.read_env", lambda: None)
    monkeypatch.setattr("harness.command.atexit.register", lambda *_: None)
    check()
