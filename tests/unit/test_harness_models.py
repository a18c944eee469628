"""What a model name means, in which order, and what is said if it means nothing."""

import json
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

import repository
from harness.errors import ConfigError
from harness.models import resolve_model


def make_folder(path: Path, **config) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(path)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """MODEL_PATH; the working directory is another one, and the hub cannot be reached."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "root"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "root"


def cache_model(tmp_path: Path, name: str) -> None:
    """Create what the hub's client leaves of a downloaded model."""
    repo = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    make_folder(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")


def test_order_is_path_then_root_then_hub(tmp_path, root):
    name = "org/llama"
    cache_model(tmp_path, name)
    assert resolve_model(name, "method.model") == name
    below_root = make_folder(root / name)
    assert resolve_model(name, "method.model") == below_root
    make_folder(Path.cwd() / name)
    assert resolve_model(name, "method.model") == name
    assert (Path(name) / "config.json").is_file()
    absolute = make_folder(tmp_path / "anywhere")
    assert resolve_model(absolute, "method.model") == absolute


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_folder(tmp_path / "mine")
    assert resolve_model("~/mine", "method.model") == folder


def test_hub_is_not_asked_for_what_is_on_disk(root, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *args: asked.append(args) or True)
    make_folder(root / "llama")
    resolve_model("llama", "method.model")
    assert not asked
    assert resolve_model("org/other", "method.model") == "org/other"
    assert asked == [("org/other", "config.json")]


def test_nothing_found_says_where_it_looked(root):
    with pytest.raises(ConfigError) as caught:
        resolve_model("llama-3", "method.draft_model")
    message = str(caught.value)
    assert message.startswith("method.draft_model: no model 'llama-3'")
    for place in ("path 'llama-3'", str(root / "llama-3"), "MODEL_PATH", "hub"):
        assert place in message
    assert "not in its cache" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (False, "it has no such model"),
        (ConnectionError("a\nb"), "asking for it failed with ConnectionError"),
    ],
)
def test_the_hubs_answer_is_told(monkeypatch, answer, reason):
    def file_exists(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub, "file_exists", file_exists)
    with pytest.raises(ConfigError, match=reason):
        resolve_model("org/llama", "method.model")


def test_invalid_hub_id_is_told():
    with pytest.raises(ConfigError, match="not a valid id there"):
        resolve_model("a/b/c", "method.model")


@pytest.mark.parametrize("name", [None, "", " ", 5, ["llama"]])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="^method.model: .* is not a model; give"):
        resolve_model(name, "method.model")


def test_folder_without_a_readable_config_is_refused(root):
    (root / "empty").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^method\.model: '.*empty' .* no config\.json"):
        resolve_model("empty", "method.model")
    (root / "empty" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^method\.model: '.*config\.json' is not JSON"):
        resolve_model("empty", "method.model")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, repository.ROOT / "models"),
        ("", repository.ROOT / "models"),
        ("./elsewhere", repository.ROOT / "elsewhere"),
        ("/absolute", Path("/absolute")),
    ],
)
def test_model_path_is_relative_to_the_repository(monkeypatch, value, expected):
    monkeypatch.delenv("MODEL_PATH")
    if value is not None:
        monkeypatch.setenv("MODEL_PATH", value)
    assert repository.model_root() == expected
    assert (repository.ROOT / "main_dataset.py").is_file()
