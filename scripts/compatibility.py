"""Writes docs/compatibility.md: what works together, as the tests have shown it.

    scripts/run_tests.sh tests --record docs/compatibility.json     # the tests that pass
    python scripts/compatibility.py                                 # the page
    python scripts/compatibility.py --check                         # whether the page is up to date

The tables below name tests, and nothing else. A cell's text comes from where these tests passed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, RECORD = ROOT / "docs/compatibility.md", ROOT / "docs/compatibility.json"
# Families are named there.
sys.path.append(str(ROOT / "tests"))

E2E, UNIT = "tests/e2e/test_", "tests/unit/test_"
YES, GPU, REFUSED, NOT_RUN, UNTESTED = "yes", "GPU", "refused", "not run", "-"


@dataclass(frozen=True)
class Cell:
    """The tests behind a cell.

    Args:
        tests: names, or beginnings of names that end with `*`. All must pass.
        is_refusal: whether they show that something is refused in one line.
        needs_gpu: whether a result on a CPU does not count.
    """

    tests: tuple[str, ...] = ()
    is_refusal: bool = False
    needs_gpu: bool = False

    def text(self, record: Mapping[str, list[str]]) -> str:
        """From the places where the tests passed."""
        if not self.tests:
            return UNTESTED
        places = [set(record[name]) for test in self.tests for name in matching(test, record)]
        if not all(matching(test, record) for test in self.tests):
            return NOT_RUN
        if self.is_refusal:
            return REFUSED
        if not self.needs_gpu and all("CPU" in of_test for of_test in places):
            return YES
        return GPU if all("GPU" in of_test for of_test in places) else NOT_RUN


@dataclass(frozen=True)
class Table:
    title: str
    text: str
    first_column: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Cell, ...]]


def e2e(*tests: str) -> Cell:
    return Cell(tuple(E2E + test for test in tests))


def refused(*tests: str) -> Cell:
    return Cell(tests, is_refusal=True)


def matching(test: str, names: Iterable[str]) -> list[str]:
    if test.endswith("*"):
        return [name for name in names if name.startswith(test[:-1])]
    return [name for name in names if name == test]


UNTRIED = Cell()
NO_ROLE = refused(f"{E2E}recurrent.py::test_what_cannot_be_done_is_refused*")
# By family with recurrent layers, the pair that tests it as the first of a cycle.
OPENS = {"granitemoehybrid": "granitemoehybrid+llama-", "nemotron_h": "nemotron_h+llama_wide-"}
ROLES = ("alone", "plain", "opens", "follows", "proposes")


def of_family(family: str) -> tuple[Cell, ...]:
    from families import NO_DRAFT, RECURRENT

    role = "families.py::test_a_family_in_a_role[{}-{}]"
    if family not in RECURRENT:
        cells = [e2e(role.format(name, family)) for name in ROLES]
        if family in NO_DRAFT:
            cells[-1] = refused(E2E + role.format("proposes", family))
        return tuple(cells)
    opens = UNTRIED
    if family in OPENS:
        test = f"{E2E}recurrent.py::test_a_recurrent_member_opens_the_cycle[{OPENS[family]}*"
        opens = Cell((test,), needs_gpu=True)  # on a CPU, the test replaces vLLM's kernels
    plain = e2e(role.format("plain", family))
    return e2e(role.format("alone", family)), plain, opens, NO_ROLE, NO_ROLE


def of_format(name: str) -> tuple[Cell, ...]:
    member = "quantized_members.py::test_a_quantized_member[{}-{}-{}]"
    cells = [
        e2e(*(member.format(name, place, policy) for place in ("first", "second")))
        for policy in ("plain", "turns")
    ]
    return *cells, e2e(f"quantized_members.py::test_by_turns_in_cuda_graphs[{name}]")


def by_client(name: str) -> tuple[Cell, Cell]:
    """A test that sends the same request to a plain ensemble and to turns."""
    cell = e2e(f"openai_client.py::{name}")
    return cell, cell


def both(plain: str, turns: str) -> tuple[Cell, Cell]:
    return e2e(plain), e2e(turns)


def no_ensemble_does(option: str, value: object) -> tuple[Cell, Cell]:
    test = f"{UNIT}chef_arguments.py::test_what_no_ensemble_does_is_refused[{option}-{value}-"
    return refused(f"{test}plain]"), refused(f"{test}turns]")


def penalties(policy: str) -> str:
    return f"sampling_parameters.py::test_penalties_and_bias_in_one_batch[probs-{policy}]"


def tables() -> list[Table]:
    from families import FAMILIES

    return [
        Table(
            "Families",
            "Each family is a tiny random model, held against transformers. *Opens* and *follows* "
            "are the places of a member that takes turns. A model that *proposes* is outside of "
            "the ensemble. The families are named after transformers, except "
            "for a few variants: `llama_wide` has more heads, and the number of "
            "`mistral_16` is its sliding window.\n\n"
            "Three families have recurrent layers. On a CPU, vLLM's kernels lose their states, so "
            "speculation with such a member needs a GPU.",
            "family",
            ROLES,
            {family: of_family(family) for family in sorted(FAMILIES)},
        ),
        Table(
            "Quantized members",
            "A quantized member beside one that is not, in either place. A stock engine tells what "
            "it computes.",
            "format",
            ("plain", "by turns", "by turns in CUDA graphs"),
            {
                "FP8 on disk": of_format("fp8"),
                "FP8, made as weights load": of_format("online"),
                "8-bit integers (compressed-tensors)": of_format("int8"),
                "GPTQ, 4 bits": of_format("gptq"),
                "AWQ, 4 bits": of_format("awq"),
                "bitsandbytes": (UNTRIED,) * 3,
            },
        ),
        Table(
            "Members",
            "",
            "members of one ensemble",
            ("plain", "by turns"),
            {
                "of different dtypes": both(
                    "member_loading.py::test_members_of_different_dtypes[float32+bfloat16-plain]",
                    "member_loading.py::test_members_of_different_dtypes[float32+bfloat16-turns]",
                ),
                "with options of their own (`hf_overrides`)": both(
                    "member_loading.py::test_overrides_are_one_members[plain]",
                    "member_loading.py::test_overrides_are_one_members[turns]",
                ),
                "with padded rows and added tokens": (
                    e2e("vocabularies.py::test_greedy_tokens_are_those_of_the_loop*"),
                )
                * 2,
                "the same checkpoint twice": both(
                    "member_loading.py::test_a_checkpoint_that_is_a_member_twice_is_kept_once[plain]",
                    "member_loading.py::test_a_checkpoint_that_is_a_member_twice_is_kept_once[turns]",
                ),
            },
        ),
        Table(
            "Features of vLLM",
            "",
            "feature",
            ("plain", "by turns"),
            {
                "chunked prefill, prefix caching": both(
                    "chef_requests.py::test_chunks_and_cached_prefixes[plain]",
                    "chef_requests.py::test_chunks_and_cached_prefixes[turns]",
                ),
                "preemption": both(
                    "recurrent.py::test_requests_that_are_preempted_resume*",
                    "chef_requests.py::test_requests_that_are_preempted_resume*",
                ),
                "async scheduling": (
                    UNTRIED,
                    e2e("chef_requests.py::test_requests_that_are_preempted_resume[True]"),
                ),
                "CUDA graphs and compilation": both(
                    "plain_ensemble.py::test_greedy_tokens_with_compilation_and_cuda_graphs*",
                    "chef_greedy.py::test_turns_with_compilation_and_cuda_graphs[contrastive-2]",
                ),
                "structured output": both(
                    "sampling_parameters.py::test_text_parameters[plain-probs]",
                    "sampling_parameters.py::test_text_parameters[chef-probs]",
                ),
                "tool calls with a parser": by_client("test_chats[tool]"),
                "streams": by_client("test_streams*"),
                "log-probabilities, also of prompts": both(
                    "sampling_parameters.py::test_logprobs_and_prompt_logprobs_are_the_ensembles"
                    "[probs-plain]",
                    "sampling_parameters.py::test_logprobs_and_prompt_logprobs_are_the_ensembles"
                    "[probs-chef]",
                ),
                "a draft model or n-grams outside": (
                    e2e("outside_proposer.py::test_output_is_the_ensembles*"),
                    e2e("chef_greedy.py::test_turns_emit_what_the_plain_ensemble_emits[outside-3]"),
                ),
                "`AsyncLLM`": (
                    UNTRIED,
                    e2e("ensemble_args.py::test_the_asynchronous_engine_takes_the_same"),
                ),
                "images in a request": tuple(
                    refused(
                        f"{E2E}families.py::test_a_request_with_an_image_is_refused_alone"
                        f"[llava+llama-{policy}]"
                    )
                    for policy in ("plain", "turns")
                ),
                "LoRA adapters": no_ensemble_does("enable_lora", True),
                "pipeline parallelism": no_ensemble_does("pipeline_parallel_size", 2),
                "tensor parallelism": both(
                    "tensor_parallel.py::test_greedy_tokens_on_two_gpus[policy0]",
                    "tensor_parallel.py::test_greedy_tokens_on_two_gpus[policy1]",
                ),
                "data parallelism": (UNTRIED, UNTRIED),
                "quantized KV cache": (UNTRIED, UNTRIED),
                "sleep mode": (UNTRIED, UNTRIED),
            },
        ),
        Table(
            "Sampling parameters",
            "",
            "parameter",
            ("plain", "by turns"),
            {
                "`temperature`, `top_k`, `top_p`": both(
                    "plain_ensemble.py::test_sampling_follows_the_ensemble_distribution*",
                    "chef_sampling.py::test_turns_sample_from_the_ensemble*",
                ),
                "`min_p`": by_client("test_completions[min_p]"),
                "`seed`": both(
                    "sampling_parameters.py::test_seeds_repeat_a_sample[probs-plain]",
                    "sampling_parameters.py::test_seeds_repeat_a_sample[probs-chef]",
                ),
                "`n`": by_client("test_completions[n]"),
                "penalties, `logit_bias`": both(penalties("plain"), penalties("chef")),
                "`bad_words`": by_client("test_completions[bad words]"),
                "`allowed_token_ids`": by_client("test_completions[allowed tokens]"),
                "`min_tokens`": by_client("test_completions[min tokens]"),
                "`stop`": by_client("test_stop_strings_across_a_windows_edge"),
                "`stop_token_ids`": by_client("test_completions[stop token ids]"),
                "`logprobs`": by_client("test_completions[logprobs]"),
                "`prompt_logprobs`": by_client("test_completions[prompt logprobs]"),
                "`structured_outputs`: JSON schema": by_client("test_completions[json]"),
                "`structured_outputs`: regular expression": by_client("test_completions[regex]"),
                "`structured_outputs`: choice": by_client("test_completions[choice]"),
                "weights of the request": by_client("test_completions[weights]"),
            },
        ),
    ]


HEADER = f"""# Compatibility

This page is made from the results of the project's tests (`scripts/compatibility.py`). A cell says
where all of its tests passed.

| cell | meaning |
|---|---|
| {YES} | the tests passed on a CPU |
| {GPU} | the tests passed on a GPU; a CPU did not run them, or not with vLLM's own kernels |
| {REFUSED} | refused in one line, before weights load or for the request alone |
| {NOT_RUN} | there are tests, but they have not passed on the machines that we had |
| {UNTESTED} | there is no test |
"""


def page(record: Mapping[str, list[str]], of: Iterable[Table]) -> str:
    parts = [HEADER]
    for table in of:
        lines = [f"## {table.title}\n", *([f"{table.text}\n"] if table.text else [])]
        lines.append(f"| {table.first_column} | {' | '.join(table.columns)} |")
        lines.append("|---" * (1 + len(table.columns)) + "|")
        for row, cells in table.rows.items():
            lines.append(f"| {row} | {' | '.join(cell.text(record) for cell in cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def tests_of(of: Iterable[Table]) -> set[str]:
    return {test for t in of for cells in t.rows.values() for cell in cells for test in cell.tests}


def collected(tests: Iterable[str]) -> list[str]:
    """The names of all tests in the files of `tests`."""
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *files]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ALL_FAMILIES": "1"},
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def used(record: Mapping[str, list[str]], tests: Iterable[str]) -> dict[str, list[str]]:
    """The part of a record that the page needs."""
    names = {name for test in tests for name in matching(test, record)}
    return {name: record[name] for name in sorted(names)}


def main() -> None:
    from recorder import text_of

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    record, of = json.loads(RECORD.read_text(encoding="utf-8")), tables()
    text = page(record, of)
    if args.check:
        names = collected(tests_of(of))
        if unknown := sorted(test for test in tests_of(of) if not matching(test, names)):
            sys.exit(f"error: scripts/compatibility.py: no such tests: {', '.join(unknown)}")
        if gone := sorted(name for name in record if name not in names):
            sys.exit(f"error: docs/compatibility.json: no such tests any more: {', '.join(gone)}")
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit("error: docs/compatibility.md: not up to date; run scripts/compatibility.py")
        return
    RECORD.write_text(text_of(used(record, tests_of(of))), encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
