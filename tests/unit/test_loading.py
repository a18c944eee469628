"""Rows of a data set: every form of a local copy, the hub and its cache, and what is refused."""

import json

import datasets
import huggingface_hub
import pandas
import pytest

from tasks import loading
from tasks.loading import DatasetSource, MissingSplit, load_rows

SOURCE = DatasetSource(
    hub_name="someone/sums",
    config="main",
    revision="0123456789abcdef0123456789abcdef01234567",
    columns={"question": str, "options": list, "answer": int},
)
ROWS = [{"question": f"{i} + 1 — ‘é’?", "options": ["a", f"{i}"], "answer": i} for i in range(7)]
OTHER = [{"question": "other", "options": [], "answer": -1}]


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv("DATASET_PATH", raising=False)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(loading, "_on_hub", refuse)


def write_jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(file)


def write_saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet, "": write_saved}


# One split


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_path_to_one_split_has_its_rows_in_order(tmp_path, no_hub, suffix):
    WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    path = str(tmp_path / f"rows{suffix}")
    rows = load_rows(SOURCE, "test", path)
    assert rows == ROWS
    assert [type(value) for value in rows[0].values()] == [str, list, int]
    assert load_rows(SOURCE, "test", path, limit=2) == ROWS[:2]


@pytest.mark.parametrize("suffix", WRITERS)
def test_worked_examples_are_not_taken_from_the_only_split(tmp_path, no_hub, suffix):
    WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    with pytest.raises(ValueError, match=r"^dataset\.path: .*one split.*'train'.*use_fewshot"):
        load_rows(SOURCE, "train", str(tmp_path / f"rows{suffix}"), worked=True)


def test_other_columns_and_blank_lines_are_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"source": "x", **row}) + "\n\n" for row in ROWS]
    file.write_text("".join(lines))
    assert load_rows(SOURCE, "test", str(file)) == ROWS


def test_a_limit_keeps_the_rest_of_a_large_file_unread(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("{broken")
    assert load_rows(SOURCE, "test", str(tmp_path / "rows.jsonl"), limit=7) == ROWS
    with pytest.raises(ValueError, match="line 8 is not JSON"):
        load_rows(SOURCE, "test", str(tmp_path / "rows.jsonl"))


# Folders


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", ["test", "main/test", "sums_test"])
def test_a_folder_has_a_place_for_each_split(tmp_path, no_hub, name, suffix):
    WRITERS[suffix](tmp_path / f"{name}{suffix}", ROWS)
    WRITERS[suffix](tmp_path / f"{name}{suffix}".replace("test", "train"), OTHER)
    assert load_rows(SOURCE, "test", str(tmp_path)) == ROWS
    assert load_rows(SOURCE, "train", str(tmp_path), worked=True) == OTHER
    with pytest.raises(MissingSplit, match=r"^dataset\.path: no split 'dev' in .*/sums_dev\.jsonl"):
        load_rows(SOURCE, "dev", str(tmp_path))


def test_a_saved_dataset_dict(tmp_path, no_hub):
    splits = {"test": ROWS, "train": OTHER}
    saved = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(SOURCE, "test", str(tmp_path / "saved")) == ROWS
    assert load_rows(SOURCE, "train", str(tmp_path / "saved"), worked=True) == OTHER


def test_class_labels_of_a_saved_set_are_numbers(tmp_path):
    features = datasets.Features(
        question=datasets.Value("string"),
        options=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=list("ABCDEFG")),
    )
    saved = datasets.Dataset.from_list(ROWS, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(SOURCE, "test", str(tmp_path / "saved")) == ROWS


def test_parts_of_a_split_are_joined_in_order_and_must_be_complete(tmp_path, no_hub):
    for part, rows in enumerate([ROWS[:3], ROWS[3:5], ROWS[5:]]):
        write_parquet(tmp_path / "main" / f"test-0000{part}-of-00003.parquet", rows)
    assert load_rows(SOURCE, "test", str(tmp_path)) == ROWS
    assert load_rows(SOURCE, "test", str(tmp_path), limit=4) == ROWS[:4]
    (tmp_path / "main" / "test-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="no split 'test'"):
        load_rows(SOURCE, "test", str(tmp_path))


# DATASET_PATH


@pytest.mark.parametrize("name", ["sums/test", "sums/main/test", "sums_test"])
def test_data_below_the_root_need_no_hub(tmp_path, monkeypatch, no_hub, name):
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    assert load_rows(SOURCE, "test") == ROWS


def test_a_file_of_another_set_below_the_root_is_not_taken(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    write_jsonl(tmp_path / "test.jsonl", OTHER)
    write_jsonl(tmp_path / "difference_test.jsonl", OTHER)
    with pytest.raises(AssertionError, match="asked the hub"):
        load_rows(SOURCE, "test")


def test_the_path_has_priority_over_the_root(tmp_path, monkeypatch, no_hub):
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    write_jsonl(tmp_path / "sums_test.jsonl", OTHER)
    write_jsonl(tmp_path / "mine.jsonl", ROWS)
    assert load_rows(SOURCE, "test", str(tmp_path / "mine.jsonl")) == ROWS


def test_a_relative_root_counts_from_the_repository(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(loading, "ROOT", tmp_path)
    monkeypatch.setenv("DATASET_PATH", "data")
    write_jsonl(tmp_path / "data" / "sums_test.jsonl", ROWS)
    assert load_rows(SOURCE, "test") == ROWS


def test_a_root_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DATASET_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^DATASET_PATH: there is no folder .*nowhere'; "):
        load_rows(SOURCE, "test")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose snapshot is a folder here; `asked` has the requests that left the machine."""

    class Hub:
        folder = tmp_path / "snapshot"
        cached = False
        asked = []

        def dataset_info(self, name, revision, timeout):
            self.asked.append((name, revision))

        def snapshot_download(self, name, repo_type, revision, allow_patterns, **options):
            assert (name, repo_type, revision) == (SOURCE.hub_name, "dataset", SOURCE.revision)
            assert allow_patterns == "main/test-*.parquet"
            if options.get("local_files_only") and not self.cached:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
            return str(self.folder)

    fake = Hub()
    fake.asked = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    write_parquet(fake.folder / "main" / "test-00000-of-00001.parquet", ROWS)
    return fake


def test_the_pinned_revision_is_fetched(hub):
    assert load_rows(SOURCE, "test") == ROWS
    assert hub.asked == [(SOURCE.hub_name, SOURCE.revision)]


def test_what_the_cache_has_is_not_asked_for(hub):
    hub.cached = True
    assert load_rows(SOURCE, "test") == ROWS
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_asked_once(hub, monkeypatch):
    def fail(*_, **__):
        hub.asked.append("failed")
        raise TimeoutError

    # The suite runs offline, which would be another reason.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "dataset_info", fail)
    with pytest.raises(ValueError) as caught:
        load_rows(SOURCE, "test")
    assert hub.asked == ["failed"]
    message = str(caught.value)
    assert message.startswith("dataset.path: no split 'test' of someone/sums: ")
    assert "DATASET_PATH is not set" in message
    assert "failed with TimeoutError" in message
    assert "columns question, options, answer" in message
    assert "'DATASET_PATH/sums/test.jsonl'" in message
    assert "\n" not in message


def test_offline_says_what_to_place_where(tmp_path, monkeypatch):
    # The client reads both settings when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DATASET_PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^dataset\.path: .*HF_HUB_OFFLINE=1") as caught:
        load_rows(SOURCE, "test")
    assert f"not below DATASET_PATH='{tmp_path}'" in str(caught.value)
    assert f"'{tmp_path}/sums/test.jsonl'" in str(caught.value)
    # the loader then finds it there
    write_jsonl(tmp_path / "sums" / "test.jsonl", ROWS)
    assert load_rows(SOURCE, "test") == ROWS


def test_offline_reads_the_clients_own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "datasets--someone--sums" / "snapshots"
    write_parquet(snapshot / ("f" * 40) / "main" / "test-00000-of-00001.parquet", OTHER)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1"):  # another revision does not do
        load_rows(SOURCE, "test")
    write_parquet(snapshot / SOURCE.revision / "main" / "test-00000-of-00001.parquet", ROWS)
    assert load_rows(SOURCE, "test") == ROWS
    with pytest.raises(MissingSplit, match="no split 'train'"):
        load_rows(SOURCE, "train")


# What is wrong with a file


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset\.path: there is no .*nowhere"):
        load_rows(SOURCE, "test", str(tmp_path / "nowhere"))
    for path in ("", 3, ["a"]):
        with pytest.raises(ValueError, match=r"^dataset\.path: .*must be a path, or null"):
            load_rows(SOURCE, "test", path)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"{'question': 1}", "line 1 is not JSON"),
        ("a.jsonl", b"[1, 2]", "row 0 .*no object with columns"),
        ("a.jsonl", b'{"question": "q", "answer": 1}', "row 0 .*no column options, but question"),
        ("a.jsonl", b"{}", "no column question, options, answer, but none"),
        (
            "a.jsonl",
            b'{"question": "q", "options": [], "answer": "B"}',
            "answer is 'B' and must be of type int",
        ),
        ("a.jsonl", b'{"question": null, "options": [], "answer": 1}', "question is None"),
        ("a.jsonl", b"\xff\xfe{}", "cannot read"),
        ("a.parquet", b"PAR1 no", "cannot read"),
        ("a.csv", b"question,answer\n", r"must end in \.jsonl or \.parquet"),
        ("a/state.json", b"{}", "cannot read"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, content, why):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    path = str(file.parent if name.endswith("state.json") else file)
    with pytest.raises(ValueError, match=rf"^dataset\.path: .*{why}") as caught:
        load_rows(SOURCE, "test", path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_column_of_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"question": "q", "Answer": 1, "options": ["a"]}])
    with pytest.raises(ValueError, match="no column answer, but question, Answer, options"):
        load_rows(SOURCE, "test", str(tmp_path / "a.parquet"))
