"""A run of lm-eval tasks with a fake session: what is refused, asked and written."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import lm_eval.evaluator
import lm_eval.tasks
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from test_lm_eval_model import MAX_LEN, ByteTokenizer, TableEngine

import harness.lm_eval_run
from harness.errors import ConfigError
from harness.lm_eval_run import run
from harness.methods import MethodSpec
from repository import ROOT

CONFIGS = ROOT / "configs"
BUILT_IN = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
DOCS = [{"q": "ab", "options": ["c", "d"], "gold": 0}, {"q": "b", "options": ["x", "y"], "gold": 1}]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{q}}"
"""
TASKS = {
    "choice": 'output_type: multiple_choice\ndoc_to_choice: "{{options}}"\ndoc_to_target: gold\n'
    "target_delimiter: ''\nmetric_list: [{metric: acc}]\ntag: [letters]",
    "written": 'output_type: generate_until\ndoc_to_target: "{{options[gold]}}"\n'
    "generation_kwargs: {until: ['.'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]",
    "unsafe": 'output_type: generate_until\ndoc_to_target: "x"\nunsafe_code: true\n'
    "metric_list: [{metric: exact_match}]",
}
GROUP = "group: both\ntask: [choice, written]\naggregate_metric_list: [{metric: acc}]\n"


@dataclasses.dataclass(frozen=True)
class FakeSession:
    spec: MethodSpec
    engine: TableEngine
    tokenizer: ByteTokenizer
    engine_config: SimpleNamespace
    max_model_len: int = MAX_LEN

    def start(self):
        # Scores must not depend on these.
        assert self.spec.sampling_params == {}
        self.engine.calls.append("start")
        return self

    def __enter__(self):
        return self.engine

    def __exit__(self, *error):
        self.engine.calls.append("close")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with tasks and the data that they name."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(
            f"task: {name}\n{COMMON.replace('DATA', str(data))}{text}\n"
        )
    (tasks / "both.yaml").write_text(GROUP)
    return tmp_path


@pytest.fixture
def engine(monkeypatch) -> TableEngine:
    engine = TableEngine()
    spec = MethodSpec("cd", ("m", "n"), {}, {"temperature": 0, "top_p": 0.9}, {"alpha": 0.1})
    config = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode="raw_logprobs"))

    def prepare(method, seed, num_slots, verbose):
        engine.prepared = (method["name"], seed, num_slots, verbose)
        return FakeSession(spec, engine, ByteTokenizer(), config)

    replaced = {
        "configure_process": lambda verbose: None,
        "check_sampling_params": lambda *_: None,
        "Session": SimpleNamespace(prepare=prepare),
        "versions": lambda: {"vllm": "0"},
        "device_name": lambda: "none",
    }
    for name, value in replaced.items():
        monkeypatch.setattr(harness.lm_eval_run, name, value)
    # lm-eval has ten thousand tasks of its own, and finding them takes seconds.
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # It lists every package and asks the compilers for their versions.
    monkeypatch.setattr(
        lm_eval.evaluator, "add_env_info", lambda results: results.update(lm_eval_version="0.4")
    )
    return engine


def make_config(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(
            "lm_eval",
            [f"include_path={folder / 'tasks'}", f"save_path={folder / 'run'}", *overrides],
        )


def start(folder: Path, *overrides: str) -> dict:
    config = make_config(folder, *overrides)
    return run(config, config.save_path)


def test_results_are_lm_evals_and_the_summary_has_the_speed(engine, folder, capsys):
    summary = start(folder, "tasks=[choice,written]", "seed=3", "bootstrap_iters=0", "batch_size=7")
    assert engine.prepared == ("cd", 3, 7, False)
    generated = ["warm_up", "synchronize", ("generate", 2, 7)]
    assert engine.calls == ["start", ("generate", 4, 7), *generated, "close"]
    assert sorted(path.name for path in (folder / "run").iterdir()) == [
        "config.yaml",
        "results.json",
        "summary.json",
    ]
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["config"]["model"] == "speculative-ensemble"
    assert results["config"]["model_args"]["name"] == "cd"
    answers = results["samples"]["written"]
    assert [sample["resps"] for sample in answers] == [[["3"]], [["4"]]]
    assert [sample["doc"]["q"] for sample in answers] == ["ab", "b"]
    assert summary == json.loads((folder / "run" / "summary.json").read_text())
    assert summary["tasks"]["choice"]["acc,none"] == results["results"]["choice"]["acc,none"]
    assert summary["num_samples"] == {"choice": 2, "written": 2}
    assert summary["versions"] == {"vllm": "0", "lm-eval": "0.4"}
    assert (summary["method"], summary["alpha"], summary["num_tokens"]) == ("cd", 0.1, 2)
    assert summary["tokens_per_second"] == 2 / summary["total_time_s"]
    assert (summary["acceptance"], summary["tokens_per_cycle"]) == (1 / 4, 3 / 2)
    shown = capsys.readouterr().out
    assert "|choice |" in shown and "|written|" in shown
    assert f"speed           {summary['tokens_per_second']:.2f} tokens/s" in shown


def test_scores_alone_have_no_speed(engine, folder, capsys):
    summary = start(folder, "tasks=choice", "log_samples=false", "limit=1")
    assert engine.prepared[2] == 1
    assert summary["num_samples"] == {"choice": 1}
    assert summary["tokens_per_second"] is None and "acceptance" not in summary
    assert "samples" not in json.loads((folder / "run" / "results.json").read_text())
    assert "tokens/s" not in capsys.readouterr().out


def test_groups_tags_patterns_and_files_name_tasks(engine, folder, capsys):
    summary = start(folder, "tasks=[both]")
    assert {"both", "choice", "written"} == summary["tasks"].keys()
    assert "|Groups" in capsys.readouterr().out
    for number, name in enumerate(["letters", "cho*", folder / "tasks" / "choice.yaml"]):
        summary = start(folder, f"tasks=['{name}']", f"save_path={folder / str(number)}")
        assert summary["tasks"].keys() == {"choice"}


def test_parameters_of_tasks_can_be_set(engine, folder):
    start(folder, "tasks=[written]", "gen_kwargs.max_gen_toks=2", "+gen_kwargs.top_p=0.5")
    params = engine.requests[0].sampling_params
    assert (params["max_tokens"], params["stop"], params["top_p"]) == (2, ["."], 0.5)


REFUSED = {
    "tasks=[]": r"tasks: there are none; name some",
    "tasks=3": r"tasks, include_path: 3 must be a name or a list of names",
    "tasks=[choise]": r"tasks: there is no 'choise'; choose another, such as choice, or set inclu",
    "tasks=[choice,both]": r"tasks: Duplicate task 'choice'.*; name it once",
    "tasks=[unsafe]": r"tasks: 'unsafe' executes what is generated, .* confirm_run_unsafe_c",
    "tasks=[written] gen_kwargs.max_gen_toks=12": r"tasks: 12 tokens are .* smaller gen_kwargs\.m",
    "tasks=[choice] num_fewshot=9": r"tasks: lm-eval cannot ask them: ",
    "tasks=[choice] num_fewshot=-1": r"num_fewshot: -1 must be an integer from 0, or null",
    "tasks=[choice] batch_size=0": r"batch_size: 0 must be an integer from 1, or null",
    "tasks=[choice] seed=x": r"seed: 'x' must be an integer from 0 to 2147483647$",
    "tasks=[choice] seed=9999999999": r"seed: 9999999999 must be an integer from 0 to 2147483647$",
    "tasks=[choice] limit=0": r"limit: 0 must be a number of samples",
    "tasks=[choice] limit=1.5": r"limit: 1\.5 must be a number of samples",
    "tasks=[choice] limit=all": r"limit: 'all' must be a number of samples",
    "tasks=[choice] include_path=nowhere": r"include_path: 'nowhere' is no folder",
    "tasks=[choice] log_samples=no_": r"log_samples: 'no_' must be true or false",
    "tasks=[choice] gen_kwargs=a": r"gen_kwargs: 'a' is not a group of keys",
    "tasks=[choice] apply_chat_template=true": r"apply_chat_template: the tokenizer has no templa",
    "tasks=[choice] +foo=1": r"foo: unknown key; known are",
    "tasks=[choice] save_path=null": r"save_path: None must be a path",
    "tasks=[choice] save_path=/dev/null/run": r"save_path: '/dev/null/run' cannot be made, ",
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.items())
def test_bad_input_is_refused_before_the_engine_starts(engine, folder, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        start(folder, *overrides.split())
    assert "\n" not in str(error.value)
    assert engine.calls == []
    assert not (folder / "run").exists()


def test_data_set_that_cannot_be_had_is_named_with_a_remedy(engine, folder):
    task = BUILT_IN / "arc" / "arc_easy.yaml"
    with pytest.raises(ConfigError, match=r"^tasks: '.*arc_easy.yaml' cannot be loaded: ") as error:
        start(folder, f"tasks=['{task}']")
    text = str(error.value)
    assert "allenai/ai2_arc" in text and "HF_HUB_OFFLINE" in text and "\n" not in text
    assert not (folder / "run").exists()


def test_logits_are_no_scores(engine, folder, monkeypatch):
    prepare = harness.lm_eval_run.Session.prepare

    def prepare_with_logits(*args):
        session = prepare(*args)
        session.engine_config.model_config.logprobs_mode = "raw_logits"
        return session

    monkeypatch.setattr(harness.lm_eval_run.Session, "prepare", prepare_with_logits)
    with pytest.raises(ConfigError, match=r"^method\.llm\.logprobs_mode: logits are no scores"):
        start(folder, "tasks=[choice]")


def test_parameters_that_vllm_does_not_know_are_the_tasks(engine, folder, monkeypatch):
    def check(params, *_):
        if "top_z" in params:
            raise ConfigError("method.generate.top_z: vLLM has no such parameter; leave it out")

    monkeypatch.setattr(harness.lm_eval_run, "check_sampling_params", check)
    with pytest.raises(ConfigError, match=r"^tasks: generation_kwargs of 'written': top_z: vLLM"):
        start(folder, "tasks=[written]", "+gen_kwargs.top_z=1")


@pytest.mark.parametrize("name", ["results.json", "summary.json", "config.yaml", "samples.jsonl"])
def test_results_that_are_there_are_kept(engine, folder, name):
    (folder / "run").mkdir()
    (folder / "run" / name).write_text("kept")
    with pytest.raises(ConfigError, match=rf"^save_path: '.*run' already holds {name}; choose"):
        start(folder, "tasks=[choice]")
    assert (folder / "run" / name).read_text() == "kept"
    assert engine.calls == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_run_that_dies_leaves_nothing(engine, folder, error, monkeypatch):
    def generate(requests, batch_size):
        assert (folder / "run" / "config.yaml").exists()
        raise error

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(type(error)):
        start(folder, "tasks=[choice]")
    assert engine.calls == ["start", "close"]
    assert not (folder / "run").exists()


def test_folder_that_another_run_takes_meanwhile_is_refused(engine, folder, monkeypatch):
    evaluate = harness.lm_eval_run._evaluate

    def evaluate_late(*args):
        (folder / "run").mkdir()
        (folder / "run" / "config.yaml").write_text("kept")
        return evaluate(*args)

    monkeypatch.setattr(harness.lm_eval_run, "_evaluate", evaluate_late)
    with pytest.raises(ConfigError, match=r"^save_path: another process writes '.*run'; choose"):
        start(folder, "tasks=[choice]")
    assert (folder / "run" / "config.yaml").read_text() == "kept"
    assert engine.calls == []


# A group of ours may have parts that are lm-eval's.
@pytest.mark.parametrize(("tasks", "scans"), [("choice", [False]), ("both", [False, True])])
def test_lm_evals_own_tasks_are_looked_through_only_if_needed(
    engine, folder, monkeypatch, tasks, scans
):
    manager, seen = lm_eval.tasks.TaskManager, []

    def make_manager(include_path, include_defaults=True):
        seen.append(include_defaults)
        return manager(include_path=include_path)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", make_manager)
    start(folder, f"tasks=[{tasks}]")
    assert seen == scans
