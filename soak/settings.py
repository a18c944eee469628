"""The keys of `configs/soak.yaml`, checked, and the two servers that they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from harness.checks import check_groups, check_known, check_path, check_seed, check_writable
from harness.errors import ConfigError
from harness.methods import METHODS
from harness.serving import Server
from repository import ROOT

# The plain ensemble of each method in which members propose.
PLAIN = {
    "ensemble_chef": "ensemble",
    "ensemble_sd": "ensemble",
    "cd_chef": "cd",
    "cd_sd": "cd",
}
HOST = "127.0.0.1"
OUR_FLAGS = ("--host", "--port", "--uds", "--served-model-name", "--seed", "--api-key")
MODEL_NAME = "soak"
# Log-probabilities after penalties and grammars: only these show whether two tokens tie.
PROCESSED = "++method.llm.logprobs_mode=processed_logprobs"


@dataclass(frozen=True)
class Settings:
    """The script's own keys, by name."""

    duration_s: float
    num_requests: int | None
    clients: int
    rounds: int
    distinct: int
    seed: int
    tolerance: float
    memory_allowance_mb: float
    handles_allowance: int
    start_s: float
    request_s: float
    rest_s: float
    save_path: str
    plain_keys: list[str]

    def __post_init__(self) -> None:
        for key in ("clients", "distinct"):
            _check_number(key, getattr(self, key), int, 1)
        # The first half of the rounds is the warm-up.
        _check_number("rounds", self.rounds, int, 2)
        _check_number("handles_allowance", self.handles_allowance, int, 0)
        if self.num_requests is not None:
            _check_number("num_requests", self.num_requests, int, self.rounds)
        for key in ("duration_s", "start_s", "request_s", "rest_s"):
            _check_number(key, getattr(self, key), (int, float), 1)
        for key in ("tolerance", "memory_allowance_mb"):
            _check_number(key, getattr(self, key), (int, float), 0)
        if not isinstance(self.plain_keys, list) or not all(
            isinstance(word, str) and word.lstrip("+").startswith("method.") and "=" in word
            for word in self.plain_keys
        ):
            raise ConfigError(
                f"plain_keys: {self.plain_keys!r} is no list of keys of the method with values, "
                "such as plain_keys=['method.llm.dtype=float32']"
            )


def _check_number(key: str, value: object, kind: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"{key}: {value!r} must be {what} of {least} or more")


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        turns: the server whose members propose.
        plain: the server of the same ensemble without proposals.
    """

    settings: Settings
    turns: Server
    plain: Server


def make_plan(keys: Sequence[str], server_args: Sequence[str], port: int) -> Plan:
    """Check everything that both servers need, before the first one starts.

    Args:
        keys: `key=value`, as typed.
        server_args: further words for the command lines of both servers.

    Raises:
        ConfigError: one line that names the key or the argument.
    """
    for word in server_args:
        if word.partition("=")[0] in OUR_FLAGS:
            raise ConfigError(f"{word.partition('=')[0]}: this script sets it; leave it out")
    config = _compose(keys)
    plain = OmegaConf.to_container(config, resolve=True)
    own = [field.name for field in fields(Settings)]
    check_known(plain, ["method", *own])
    check_groups(plain, ("method", "method.generate", "method.llm"))
    check_seed(plain["seed"])
    check_path(plain, "save_path")
    settings = Settings(**{key: plain[key] for key in own})
    check_writable(Path(settings.save_path))
    name = plain["method"].get("name")
    if name not in PLAIN:
        raise ConfigError(f"method: members of '{name}' do not propose; use {', '.join(PLAIN)}")
    words = [*server_args, "--host", HOST, "--port", str(port)]
    turns = Server(_served(config), words)
    try:
        plain_config = _compose(plain_words(keys, PLAIN[name], settings.plain_keys))
        return Plan(settings, turns, Server(_served(plain_config), words))
    except ConfigError as error:
        raise ConfigError(f"the plain server: {error}") from error


def plain_words(keys: Sequence[str], method: str, plain_keys: Sequence[str]) -> list[str]:
    """The keys of the plain server: those of the server of turns, without what turns add.

    A plain ensemble's `gamma` belongs to a draft model, which it does not have here.
    """
    kept = [word for word in keys if _is_of(word, method)]
    return [*kept, f"method={method}", *plain_keys, PROCESSED]


def _is_of(word: str, method: str) -> bool:
    key = word.partition("=")[0].lstrip("+~")
    if key == "method":
        return False
    _, _, name = key.partition("method.")
    if not name or "." in name:
        return True
    return name != "gamma" and name in ("model", *METHODS[method].keys)


def _compose(words: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("soak", list(words))


def _served(config: DictConfig) -> DictConfig:
    """The keys of `configs/serve.yaml`."""
    kept = {"method": config.method, "seed": config.seed, "served_model_name": MODEL_NAME}
    return OmegaConf.create(kept)
