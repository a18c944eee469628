"""The run directory: what a run that dies leaves behind, and what is never overwritten."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, Field, ValidationError, model_validator

from harness.errors import MAX_LENGTH, ConfigError, RunError, one_line
from harness.results import Progress, RunDirectory, table

TEXT = 'é "quoted"\r\nline 🙂\u2028 and half a character \ud83d'
CONFIG = {"method": {"name": "cd", "gamma": [1, 5], "llm": {}}, "seed": 0, "save_path": "a"}
SAMPLE = {
    "index": 0,
    "prompt": "p",
    "elapsed_s": 1.0,
    "completion": TEXT,
    "token_ids": [1, 2],
    "score": None,
}


@pytest.fixture
def directory(tmp_path) -> Iterator[RunDirectory]:
    with closing(RunDirectory(tmp_path / "a" / "run", CONFIG)) as run:
        run.open()
        yield run


def test_nothing_is_written_before_create(tmp_path):
    run = RunDirectory(tmp_path / "a" / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []
    with closing(run):
        run.open()
    assert OmegaConf.load(tmp_path / "a" / "run" / "config.yaml") == CONFIG


def test_samples_come_back_in_the_order_of_the_data_set(directory):
    for index in (3, 0, 2):
        directory.append_sample({**SAMPLE, "index": index})
    assert directory.read_samples() == [{**SAMPLE, "index": index} for index in (0, 2, 3)]
    assert len(directory.samples.read_text().splitlines()) == 3


def test_killed_run_keeps_every_sample_it_had(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from harness.results import RunDirectory\n"
        "run = RunDirectory(sys.argv[1], {}); run.open()\n"
        "for index in range(3):\n"
        "    run.append_sample({'index': index, 'completion': 'x' * 100_000})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "run"
    dead = subprocess.run([sys.executable, "-c", program, path])
    assert dead.returncode == -signal.SIGKILL
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    assert {len(sample["completion"]) for sample in samples} == {100_000}


def test_run_of_the_same_configuration_is_continued(directory):
    directory.append_sample(SAMPLE)
    directory.close()
    again = RunDirectory(directory.path, {**CONFIG, "save_path": "b", "verbose": True})
    with closing(again):
        again.open()
        again.append_sample({**SAMPLE, "index": 1})
    assert [sample["index"] for sample in again.read_samples()] == [0, 1]
    assert OmegaConf.load(directory.path / "config.yaml") == CONFIG


@pytest.mark.parametrize(
    ("config", "differences"),
    [
        ({**CONFIG, "seed": 1}, r"seed \(0 there, 1 here\)"),
        ({**CONFIG, "more": 1}, r"more \(not set there, 1 here\)"),
        (
            {**CONFIG, "method": {"name": "cd", "gamma": [1, 4], "llm": {"dtype": "half"}}},
            r"method\.gamma \(\[1, 5\] there, \[1, 4\] here\), method\.llm \(\{\} there, not set "
            r"here\), method\.llm\.dtype \(not set there, half here\)",
        ),
    ],
)
def test_run_of_another_configuration_is_refused(directory, config, differences):
    directory.append_sample(SAMPLE)
    directory.close()
    with pytest.raises(
        ConfigError,
        match=f"^save_path: '.*run' holds a run that differs in {differences}; choose another",
    ):
        RunDirectory(directory.path, config)
    assert directory.read_samples() == [SAMPLE]


def test_samples_without_a_configuration_are_refused(directory):
    directory.append_sample(SAMPLE)
    directory.close()
    (directory.path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="^save_path: '.*run' holds samples but no config.yaml"):
        RunDirectory(directory.path, CONFIG)


@pytest.mark.parametrize("text", ["a: [", "${x}", "\0"])
def test_configuration_that_cannot_be_read_is_refused(directory, text):
    (directory.path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="^save_path: "):
        RunDirectory(directory.path, CONFIG)


def test_line_that_was_cut_off_is_left_out(directory):
    directory.append_sample(SAMPLE)
    directory.append_sample({**SAMPLE, "index": 1})
    directory.close()
    text = directory.samples.read_bytes()
    directory.samples.write_bytes(text[:-5])
    again = RunDirectory(directory.path, CONFIG)
    assert again.read_samples() == [SAMPLE]
    with closing(again):
        again.open()
        again.append_sample({**SAMPLE, "index": 2})
    assert [sample["index"] for sample in again.read_samples()] == [0, 2]


def test_of_two_runs_that_start_together_one_is_refused(tmp_path):
    first, second = (RunDirectory(tmp_path / "run", CONFIG) for _ in range(2))
    first.open()
    with pytest.raises(ConfigError, match="^save_path: another process writes '.*run'; wait"):
        second.open()
    first.append_sample(SAMPLE)
    first.close()
    with pytest.raises(ConfigError, match="another process writes"):
        second.open()  # what it knew is out of date
    assert first.read_samples() == [SAMPLE]


def test_of_two_runs_that_start_together_the_other_may_be_a_different_one(tmp_path):
    first, second = RunDirectory(tmp_path / "run", CONFIG), RunDirectory(tmp_path / "run", {"a": 1})
    first.open()
    first.close()
    with pytest.raises(ConfigError, match="differs in .*a "):
        second.open()
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == CONFIG


def test_directory_with_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with closing(RunDirectory(tmp_path, CONFIG)) as run:
        run.open()
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "notes.txt", "samples.jsonl"]


def test_counts_are_kept(directory):
    assert directory.read_progress() == Progress(parts=0, counts={})
    directory.write_progress(Progress(2, {"num_tokens": 3}))
    directory.close()
    assert RunDirectory(directory.path, CONFIG).read_progress() == Progress(2, {"num_tokens": 3})


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"index": 0}', "\xff"])
def test_damaged_line_is_named(directory, line):
    directory.append_sample(SAMPLE)
    with directory.samples.open("a", encoding="latin-1") as file:
        file.write(f"{line}\n")
    with pytest.raises(ConfigError, match=r"^save_path: line 2 of '.*' is damaged; remove it"):
        directory.read_samples()


@contextmanager
def full_after(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond `num_bytes`, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_whole_samples_alone_and_the_run_goes_on_later(directory):
    sample = {"index": 0, "prompt": "p", "elapsed_s": 1.0, "completion": "c" * 1000}
    directory.open()
    directory.append_sample(sample)
    size = directory.samples.stat().st_size
    with full_after(size + 500), pytest.raises(RunError) as caught:
        directory.append_sample({**sample, "index": 1})
    line = f"save_path: '{directory.samples}' cannot be written (File too large); what was"
    assert str(caught.value).startswith(line)
    assert directory.samples.stat().st_size == size
    directory.append_sample({**sample, "index": 2})
    assert [found["index"] for found in directory.read_samples()] == [0, 2]


def test_full_disk_leaves_no_part_of_a_summary(directory):
    directory.open()
    directory.write_summary({"score": 1})
    with full_after(500), pytest.raises(RunError, match="summary.json' cannot be written"):
        directory.write_summary({"score": "x" * 1000})
    assert directory.read_summary() == {"score": 1}
    assert not [*directory.path.glob(".*.partial")]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("~/x/run", CONFIG).path == tmp_path / "x" / "run"


def test_damaged_summary_is_named(directory):
    (directory.path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^save_path: '.*summary.json' is damaged; remove it"):
        directory.read_summary()


def test_run_that_is_under_way_is_refused_at_once(directory):
    with pytest.raises(ConfigError, match="^save_path: another process writes"):
        RunDirectory(directory.path, CONFIG)


def test_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="^save_path: .* cannot be made, '.*file' is no folder"):
        RunDirectory(tmp_path / "file" / "run", CONFIG)


def test_relative_path_in_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(RunDirectory("new/run", CONFIG)) as run:
        run.open()
    assert (tmp_path / "new" / "run" / "samples.jsonl").is_file()


def test_scores_replace_the_samples_at_once_or_not_at_all(directory, monkeypatch):
    directory.append_sample(SAMPLE)
    scored = {**SAMPLE, "score": 1.0}
    seen = []

    def replace(source, target):
        # At this moment the new file is whole, and the old one is unchanged.
        seen.append((json.loads(source.read_text()), json.loads(target.read_text())))
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(RunError, match="power cut"):
            directory.write_scores([scored])
    assert seen == [(scored, SAMPLE)]
    assert directory.read_samples() == [SAMPLE]
    directory.write_scores([scored])
    assert directory.read_samples() == [scored]
    assert sorted(os.listdir(directory.path)) == ["config.yaml", "samples.jsonl"]


def test_summary_is_json(directory):
    directory.write_summary({"method": "cd", "score": None})
    summary = json.loads((directory.path / "summary.json").read_text())
    assert summary == {"method": "cd", "score": None}


def test_table_is_aligned():
    assert table({"method": "cd", "data set": 5}) == "method    cd\ndata set  5"


class Model(BaseModel):
    length: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def check(self):
        if self.length > 9:
            raise ValueError(f"length {self.length}\n is too much")
        return self


@pytest.mark.parametrize(
    ("length", "line"),
    [
        (0, "Input should be greater than 0"),
        (10, "length 10 is too much"),
    ],
)
def test_one_line_of_pydantic_is_its_reason(length, line):
    with pytest.raises(ValidationError) as caught:
        Model(length=length)
    assert "\n" in str(caught.value)
    assert one_line(caught.value) == line


def test_one_line_of_anything_is_one_short_line():
    assert one_line(ValueError("a:\n  b\t c ")) == "a: b c"
    long = one_line(ValueError("word " * 1000))
    assert len(long) <= MAX_LENGTH and long.endswith("word ...")
