"""What each method asks of vLLM: members in the user's order, engine arguments, parameters."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_models import llama_config

from harness import methods
from harness.errors import ConfigError
from harness.methods import METHODS, make_spec
from repository import ROOT
from vllm.chef.arguments import CHEF_WORKER, ENSEMBLE_WORKER

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Model folders without weights.

    `small` is the cheapest; it reads 64 tokens, the others read 128.
    """
    root = tmp_path_factory.mktemp("models")
    for name in ("large", "other", "third"):
        llama_config().save_pretrained(root / name)
    llama_config(layers=1, max_position_embeddings=64).save_pretrained(root / "small")
    return root


@pytest.fixture(autouse=True)
def model_path(root, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(root))
    # Another test covers what a platform adds.
    monkeypatch.setattr(methods, "_platform_defaults", dict)


def config(name: str, *overrides: str) -> dict:
    """The group `method` as the command line gives it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("default", [f"method={name}", *overrides])
    return OmegaConf.to_container(composed.method, resolve=True)


def spec(name: str, *overrides: str) -> methods.MethodSpec:
    return make_spec(config(name, "method.model=large", *overrides))


def test_every_method_has_a_config_of_its_keys():
    files = {path.stem for path in (CONFIGS / "method").glob("[!_]*.yaml")}
    assert files == set(METHODS)
    for name in files:
        assert config(name)["name"] == name
        assert config(name).keys() <= {"name", *methods.COMMON_KEYS, *METHODS[name].keys}


def test_large_model(root):
    result = spec("large_model")
    assert result.members == (str(root / "large"),)
    assert result.engine_args == {"model": str(root / "large")}
    assert result.sampling_params == {"temperature": 0}
    assert result.parameters == {}


def test_sd(root):
    result = spec("sd", "method.draft_model=small", "method.gamma=3")
    assert result.members == (str(root / "large"),)
    draft = str(root / "small")
    assert result.engine_args == {
        "model": str(root / "large"),
        "speculative_config": {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": 3,
        },
        "max_model_len": 64,  # the draft model's
    }
    assert result.parameters == {"draft_model": draft, "gamma": 3}


def test_cd(root):
    result = spec("cd", "method.amateur_model=small", "method.alpha=0.3")
    assert result.members == (str(root / "large"), str(root / "small"))
    assert result.engine_args["model"] == str(root / "large")
    assert result.engine_args["worker_cls"] == ENSEMBLE_WORKER
    assert result.engine_args["additional_config"]["ensemble"] == {
        "extra_model": [str(root / "small")],
        "ensemble_fn": "contrastive",
        "ensemble_target": "raw-logits",
        "alpha": 0.3,
        "ensemble_args": {},
    }
    assert result.parameters["alpha"] == 0.3
    assert result.parameters["ensemble_fn"] == "contrastive"


def test_ensemble_of_a_string(root):
    result = spec("ensemble", "method.extra_model=other", "method.weights=[0.7,0.3]")
    assert result.members == (str(root / "large"), str(root / "other"))
    ensemble = result.engine_args["additional_config"]["ensemble"]
    assert ensemble["extra_model"] == [str(root / "other")]
    assert ensemble["weights"] == [0.7, 0.3]
    assert (ensemble["ensemble_fn"], ensemble["ensemble_target"]) == ("weighted", "probs")
    assert result.parameters["weights"] == [0.7, 0.3]


def test_ensemble_of_a_list_keeps_its_order(root):
    result = spec("ensemble", "method.extra_model=[third,small,other]")
    expected = [str(root / name) for name in ("large", "third", "small", "other")]
    assert list(result.members) == expected
    ensemble = result.engine_args["additional_config"]["ensemble"]
    assert ensemble["extra_model"] == expected[1:]
    assert "weights" not in ensemble


def test_options_of_the_target_are_not_the_drafts(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vllm.chef.arguments.model_config",
        lambda path, field, args: seen.append((field, args)) or SimpleNamespace(max_model_len=64),
    )
    overrides = "method.model=other method.draft_model=small +method.llm.revision=x"
    spec("sd", *overrides.split(), "+method.llm.hf_overrides={a:1}")
    (_, of_target), (_, of_draft) = seen
    assert of_target["revision"] == "x" and not {"revision", "hf_overrides"} & of_draft.keys()


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("cd", "method.amateur_model={model:small,dtype:float16,revision:x}"),
        ("ensemble_chef", "method.extra_model=[{model:small,dtype:float16,revision:x}]"),
    ],
)
def test_a_member_loaded_in_a_way_of_its_own(name, override, root):
    result = spec(name, override)
    small = str(root / "small")
    assert result.members[1] == small
    (other,) = result.engine_args["additional_config"]["ensemble"]["extra_model"]
    assert other == {"model": small, "dtype": "float16", "revision": "x"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("[{model:small,dtyp:x}]", r"^method\.extra_model\.dtyp: unknown key; known are model"),
        ("[{dtype:float16}]", r"^method\.extra_model\.model: None is not a model"),
        ("[{model:nope}]", r"^method\.extra_model\.model: no model 'nope'"),
    ],
)
def test_entries_that_are_no_members(override, line):
    with pytest.raises(ConfigError, match=line):
        spec("ensemble", f"method.extra_model={override}")


@pytest.mark.parametrize(
    ("name", "member"), [("cd", "method.amateur_model"), ("ensemble", "method.extra_model")]
)
def test_draft_model_proposes_to_the_plain_ensemble(root, name, member):
    result = spec(name, f"{member}=other", "method.draft_model=small", "method.gamma=3")
    assert result.members == (str(root / "large"), str(root / "other"))
    assert result.engine_args["worker_cls"] == ENSEMBLE_WORKER
    assert result.engine_args["speculative_config"] == {
        "method": "draft_model",
        "model": str(root / "small"),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    recorded = {key: result.parameters[key] for key in ("draft_model", "gamma")}
    assert recorded == {"draft_model": str(root / "small"), "gamma": 3}
    assert result.turns is None


def test_without_a_draft_model_its_gamma_means_nothing():
    result = spec("cd", "method.amateur_model=other", "method.gamma=-1")
    assert "speculative_config" not in result.engine_args
    assert not {"draft_model", "gamma"} & result.parameters.keys()


TURNS = [
    # name, members after the first, gamma, its gammas, order of the calls, window, carrier
    ("cd_sd", "small", "3", 3, [0, 1], 3, "small"),
    ("ensemble_sd", "[small,other]", "4", 4, [0, 1, 2], 4, "other"),
    ("cd_chef", "small", "3", [1, 3], [0, 1], 3, "small"),
    ("cd_chef", "small", "[2,1]", [2, 1], [1, 0], 2, "large"),
    ("ensemble_chef", "[small,other]", "3", [1, 3, 1], [0, 2, 1], 4, "small"),
    ("ensemble_chef", "[small,other]", "[2,3,1]", [2, 3, 1], [2, 0, 1], 5, "small"),
]


@pytest.mark.parametrize(("name", "limit"), [("cd_chef", [1, 4]), ("cd_sd", 4)])
def test_gamma_that_is_chosen_as_it_goes(name, limit):
    options = ["method.amateur_model=other", "method.gamma=auto", "method.max_gamma=4"]
    result = spec(name, *options)
    assert result.engine_args["scheduler_cls"] == "vllm.chef.scheduler.make_scheduler"
    speculative = result.engine_args["speculative_config"]
    assert speculative["num_speculative_tokens"] == 4
    assert speculative["num_speculative_tokens_per_batch_size"] == [
        [size, size, 5 - size] for size in range(1, 6)
    ]
    assert (result.parameters["gamma"], result.parameters["max_gamma"]) == ("auto", limit)
    assert result.engine_args["additional_config"]["chef"]["max_gamma"] == limit


@pytest.mark.parametrize(("name", "others", "gamma", "gammas", "order", "window", "carrier"), TURNS)
def test_turns(root, name, others, gamma, gammas, order, window, carrier):
    member = "method.amateur_model" if name.startswith("cd") else "method.extra_model"
    result = spec(name, f"{member}={others}", f"method.gamma={gamma}")
    names = ["large", *others.strip("[]").split(",")]
    assert result.members == tuple(str(root / member) for member in names)
    assert result.engine_args["worker_cls"] == CHEF_WORKER
    policy = name.split("_")[1]
    chef = result.engine_args["additional_config"]["chef"]
    # The resolved values, so that nobody has to compute them again.
    order_of_calls = {} if policy == "sd" else {"turn_order": order}
    assert chef == {"policy": policy, "gamma": gammas, **order_of_calls}
    plain = spec(name.split("_")[0], f"{member}={others}")
    ensemble = plain.engine_args["additional_config"]["ensemble"]
    assert result.engine_args["additional_config"]["ensemble"] == ensemble
    assert result.engine_args["speculative_config"] == {
        "method": "draft_model",
        "model": str(root / carrier),
        "num_speculative_tokens": window,
        "rejection_sample_method": "block",
    }
    assert result.engine_args["max_model_len"] == 64
    assert result.turns.window == window
    assert result.parameters == {**plain.parameters, "gamma": gammas, "turn_order": order}


def test_order_of_turns_is_the_users():
    result = spec("ensemble_chef", "method.extra_model=[small,other]", "method.turn_order=[2,0,1]")
    assert result.parameters["turn_order"] == [2, 0, 1]
    assert result.engine_args["additional_config"]["chef"]["turn_order"] == [2, 0, 1]


def test_member_of_weight_0_proposes_only():
    result = spec(
        "ensemble_chef",
        "method.extra_model=[other,small]",
        "method.weights=[0.5,0.5,0]",
        "method.gamma=4",
    )
    assert result.turns.counted == (True, True, False)
    assert result.parameters["gamma"] == [1, 1, 4]


def test_parameters_of_the_function_are_passed_on():
    result = spec(
        "cd",
        "method.amateur_model=other",
        "method.llm.ensemble_fn=contrastive_plausible",
        "method.llm.ensemble_target=probs",
        "+method.llm.ensemble_args.plausibility=0.2",
    )
    ensemble = result.engine_args["additional_config"]["ensemble"]
    assert ensemble["ensemble_fn"] == "contrastive_plausible"
    assert ensemble["ensemble_target"] == "probs"
    assert ensemble["ensemble_args"] == {"plausibility": 0.2}


def test_context_is_that_of_the_smallest_member_unless_given():
    assert "max_model_len" not in spec("large_model").engine_args
    short = spec("ensemble", "method.extra_model=[other,small]")
    assert short.engine_args["max_model_len"] == 64
    given = spec("ensemble", "method.extra_model=[other,small]", "method.llm.max_model_len=32")
    assert given.engine_args["max_model_len"] == 32


@pytest.mark.parametrize("name", ["sd", "ensemble"])
def test_context_is_that_of_a_shorter_draft_model_and_a_line_says_so(name, caplog):
    others = [] if name == "sd" else ["method.extra_model=other"]
    short = spec(name, *others, "method.draft_model=small")
    assert short.engine_args["max_model_len"] == 64
    (line,) = [r.getMessage() for r in caplog.records if r.name == "harness.methods"]
    assert line.startswith("the draft model '")
    assert "limits the context to 64 tokens; for a longer context, choose another" in line
    caplog.clear()
    spec(name, *others, "method.draft_model=other")
    assert not [record for record in caplog.records if record.name == "harness.methods"]


def test_engine_arguments_and_sampling_parameters_are_passed_by_name(monkeypatch):
    monkeypatch.setattr(methods, "_platform_defaults", lambda: {"dtype": "float32", "x": 1})
    result = spec(
        "large_model",
        "method.llm.dtype=bfloat16",
        "+method.llm.block_size=16",
        "method.generate.top_p=0.9",
        "+method.generate.prompt_logprobs=2",
    )
    # The user's values override the platform's defaults; null is not passed on.
    expected = {"dtype": "bfloat16", "x": 1, "block_size": 16}
    assert {k: v for k, v in result.engine_args.items() if k != "model"} == expected
    assert result.sampling_params == {"temperature": 0, "top_p": 0.9, "prompt_logprobs": 2}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sd", ["method.gamma=0"], r"^method\.gamma: 0 is out of range; it must be 1"),
        ("sd", ["method.gamma=1.5"], r"^method\.gamma: 1\.5"),
        ("sd", ["method.gamma=true"], r"^method\.gamma: True"),
        ("sd", ["method.draft_model=nope"], r"^method\.draft_model: no model 'nope'"),
        ("cd", ["method.amateur_model=nope"], r"^method\.amateur_model: no model 'nope'"),
        ("cd", ["method.alpha=2"], r"^method\.alpha: 2 is out of range"),
        ("ensemble", ["method.extra_model=[other,nope]"], r"^method\.extra_model: no model 'nope'"),
        ("ensemble", ["method.extra_model=[]"], r"^method\.extra_model: \[\] names no other"),
        ("ensemble", ["method.extra_model=null"], r"^method\.extra_model: None names no other"),
        ("ensemble", ["method.extra_model=5"], r"^method\.extra_model: 5 names no other"),
        ("ensemble", ["method.weights=[1,2,3]"], r"^method\.weights: 3 weights for 2 members"),
        (
            "ensemble",
            ["+method.turn_order=[0,1]"],
            r"^method\.turn_order: ensemble has no such key; it has",
        ),
        ("ensemble", ["+method.alpha=0.1"], r"^method\.alpha: .* has no parameter 'alpha'"),
        ("cd", ["method.generate.temperature=-1"], r"^method\.generate\.temperature: -1 is out"),
        ("cd", ["method.generate.temperature=inf"], r"^method\.generate\.temperature: inf"),
        ("cd", ["method.generate.temperature=hot"], r"^method\.generate\.temperature: 'hot'"),
        ("cd", ["+method.generate.n=2"], r"^method\.generate\.n: a run keeps one completion"),
        ("cd", ["+method.llm.model=other"], r"^method\.llm\.model: a run of cd sets it"),
        ("cd", ["+method.llm.seed=1"], r"^method\.llm\.seed: a run of cd sets it"),
        ("cd", ["+method.llm.worker_cls=W"], r"^method\.llm\.worker_cls: a run of cd sets it"),
        (
            "sd",
            ["method.llm.speculative_config={method:ngram}"],
            r"^method\.llm\.speculative_config: a run of sd sets it",
        ),
        ("cd", ["method.draft_model=nope"], r"^method\.draft_model: no model 'nope'"),
        (
            "cd",
            ["method.draft_model=small", "method.gamma=0"],
            r"^method\.gamma: 0 is out of range; it must be 1",
        ),
        (
            "ensemble",
            ["method.draft_model=small", "method.llm.speculative_config={method:ngram}"],
            r"^method\.draft_model: method\.llm\.speculative_config asks .*; leave one of them out",
        ),
        (
            "cd",
            ["+method.llm.per_request_spec_decode_metrics=none"],
            r"^method\.llm\.per_request_spec_decode_metrics: a run of cd sets it; leave it out",
        ),
        (
            "cd_chef",
            ["method.llm.speculative_config={method:ngram}"],
            r"^method\.llm\.speculative_config: a run of cd_chef sets it; leave it out",
        ),
        ("cd_chef", ["method.gamma=0"], r"^method\.gamma: 0 is out of range; it must be 1"),
        ("cd_chef", ["method.gamma=null"], r"^method\.gamma: None is out of range; it must be 1"),
        ("cd_chef", ["method.gamma=most"], r"^method\.gamma: 'most' is out .* or \"auto\"$"),
        (
            "cd_chef",
            ["method.gamma=auto", "method.max_gamma=0"],
            r"^method\.max_gamma: 0 is out of range; it must be 1 or more$",
        ),
        (
            "cd_chef",
            ["method.gamma=auto", "method.max_gamma=[1,2,3]"],
            r"^method\.max_gamma: .* 3 entries for 2 members; give",
        ),
        ("cd_chef", ["method.gamma=[2,3]"], r"^method\.gamma: \[2, 3\] has no 1; .* gamma 1"),
        ("cd_chef", ["method.gamma=[1,2,3]"], r"^method\.gamma: .* 3 entries for 2 members; give"),
        ("cd_chef", ["method.turn_order=[0,0]"], r"^method\.turn_order: \[0, 0\] must name each"),
        (
            "cd_chef",
            ["method.turn_order=[1,0]"],
            r"^method\.turn_order: member 1 \(counted from 0\) cannot be the first",
        ),
        ("cd_chef", ["method.turn_order=1"], r"^method\.turn_order: 1 is no list of members"),
        (
            "cd_chef",
            ["+method.draft_model=other"],
            r"^method\.draft_model: cd_chef has no",
        ),
        ("cd_sd", ["method.gamma=[1,2]"], r"^method\.gamma: \[1, 2\] is a list, .* one number"),
        ("cd_sd", ["+method.turn_order=[0,1]"], r"^method\.turn_order: cd_sd has no such key"),
        (
            "ensemble_chef",
            ["method.weights=[1,0]"],
            r"^method\.weights: only member 0 \(counted from 0\) has a weight above 0",
        ),
        (
            "ensemble_sd",
            ["method.extra_model=[other,third]", "method.weights=[1,0,1]"],
            r"^method\.weights: member 1 \(counted from 0\) has weight 0 and would neither score "
            "nor propose, because with policy sd only the last member proposes; leave",
        ),
    ],
)
def test_bad_input_names_the_key(name, overrides, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    others = {
        "sd": "method.draft_model=other",
        "cd": "method.amateur_model=small",
        "ensemble": "method.extra_model=small",
    }
    with pytest.raises(ConfigError, match=message) as caught:
        spec(name, others[name.split("_")[0]], *overrides)
    assert "\n" not in str(caught.value)


def test_unknown_name_is_refused():
    method = {**config("large_model"), "name": "chef"}
    with pytest.raises(ConfigError, match="^method: unknown method 'chef'; choose one of large"):
        make_spec(method)


def test_configuration_is_left_as_it_was():
    method = config("cd", "method.model=large", "method.amateur_model=other")
    before = deepcopy(method)
    make_spec(method)
    assert method == before


def test_without_a_gpu_the_defaults_are_those_of_a_cpu(monkeypatch):
    monkeypatch.undo()
    from vllm import platforms

    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: True)
    assert methods._platform_defaults()["dtype"] == "float32"
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    assert methods._platform_defaults() == {}
