"""Members that share a tokenizer but not all of its rows: what each has, and what is refused."""

from pathlib import Path

import pytest
import torch
from fakes import TableMember
from tiny_models import llama_config, save_byte_tokenizer
from tokenizers import Tokenizer
from vllm.config import ModelConfig

from vllm.ensemble_decode import ConfigFieldError, vocabulary
from vllm.ensemble_decode.vocabulary import (
    FittedMember,
    MemberVocabulary,
    check_tokenizers,
    fitted,
    member_vocabularies,
)

EOS = 0
NUM_TOKENS = 257  # of the byte tokenizer: 256 bytes and the end token


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, rows, added in (
        ("exact", NUM_TOKENS, ()),
        ("padded", 320, ()),
        ("tuned", 260, ("<pad>", "<chat>")),
    ):
        llama_config(rows, 1).save_pretrained(root / name)
        save_byte_tokenizer(str(root / name), added=added)
    return root


def configs(root: Path, *names: str, **arguments) -> list[ModelConfig]:
    return [ModelConfig(model=str(root / name), **arguments) for name in names]


def lacking(vocabularies: list[MemberVocabulary]) -> list[list[int]]:
    return [list(vocabulary.lacking) for vocabulary in vocabularies]


def test_rows_without_a_token_count_for_nobody(root):
    padded, exact = member_vocabularies(configs(root, "padded", "exact"))
    assert padded == MemberVocabulary(320, 320, tuple(range(NUM_TOKENS, 320)), EOS)
    assert exact == MemberVocabulary(320, NUM_TOKENS, tuple(range(NUM_TOKENS, 320)), EOS)
    assert lacking(member_vocabularies(configs(root, "exact", "padded"))) == [[], []]


def test_what_one_member_has_alone_is_lacking_in_the_others_only(root):
    tuned, padded = member_vocabularies(configs(root, "tuned", "padded"))
    assert tuned.lacking == (259,)
    assert padded.lacking == (257, 258, 259)


def test_a_token_beyond_the_first_members_rows_is_refused_where_it_could_be_emitted(root):
    members = configs(root, "exact", "tuned")
    message = (
        r"^--model/ensemble\.extra_model: '.*tuned' has token 258, beyond the 257 rows of '.*exact'"
    )
    with pytest.raises(ValueError, match=message):
        member_vocabularies(members)
    assert lacking(member_vocabularies(members, union_needed=False)) == [[], []]


def test_without_tokenizers_the_smallest_number_of_rows_is_all_that_is_known(root):
    members = configs(root, "padded", "tuned", skip_tokenizer_init=True)
    expected = list(range(260, 320))
    assert lacking(member_vocabularies(members)) == [expected, expected]


def test_what_is_read_in_place_of_a_token_can_be_named(root):
    members = configs(root, "tuned", "padded")
    named = member_vocabularies(members, read_as=(None, "!"))
    assert [member.read_as for member in named] == [EOS, 1]
    with pytest.raises(ConfigFieldError, match=r"^ensemble\.read_as: '.*' has no token '<no>'"):
        member_vocabularies(members, read_as=("<chat>", "<no>"))
    members = configs(root, "tuned", "padded", skip_tokenizer_init=True)
    with pytest.raises(ConfigFieldError, match=r"^ensemble\.read_as: .* needs tokenizers"):
        member_vocabularies(members, read_as=("!", "!"))


def test_the_log_says_once_what_is_read_in_place_of_what(root, monkeypatch):
    lines = []
    monkeypatch.setattr(
        vocabulary.logger, "info_once", lambda line, *args: lines.append(line % args)
    )
    for names in (("padded", "exact"), ("tuned", "padded")):
        members = configs(root, *names)
        vocabulary.log_what_is_read(members, ("!", "!"))
    (line,) = lines  # nobody has a token in padded rows
    assert "padded' lacks 2 tokens of the ensemble, such as 257. It reads token 1" in line


def swapped(root: Path) -> None:
    """The tokenizer of `exact` with two tokens exchanged."""
    tokenizer = (root / "exact" / "tokenizer.json").read_text()
    a, b = (Tokenizer.from_str(tokenizer).id_to_token(token) for token in (40, 41))
    text = tokenizer.replace(f'"{a}": 40', f'"{a}": 99999').replace(f'"{b}": 41', f'"{b}": 40')
    (root / "swapped" / "tokenizer.json").write_text(text.replace("99999", "41"))


def test_one_id_for_two_tokens_is_refused_and_named(root):
    llama_config(NUM_TOKENS, 1).save_pretrained(root / "swapped")
    save_byte_tokenizer(str(root / "swapped"))
    swapped(root)
    with pytest.raises(ValueError, match=r"^key: .* disagree: 40 is '.' in one and '.' in the"):
        check_tokenizers(configs(root, "exact", "swapped"), "key")


def test_a_plain_token_of_one_member_alone_is_refused(root):
    """Added tokens do not change other tokens; a model's own token brings other merges."""
    check_tokenizers(configs(root, "exact", "tuned"))
    llama_config(260, 1).save_pretrained(root / "merged")
    save_byte_tokenizer(str(root / "merged"), ("th",))
    for pair in (["exact", "merged"], ["merged", "exact"]):
        with pytest.raises(ValueError, match=r"disagree: 'th' \(257\) is in one only;"):
            check_tokenizers(configs(root, *pair))


def test_a_member_reads_and_scores_only_what_it_has():
    member = TableMember(torch.arange(16.0).view(4, 4), width=2)
    vocabulary = MemberVocabulary(vocab_size=6, num_rows=4, lacking=(1, 4, 5), read_as=3)
    model = fitted(member, vocabulary, torch.device("cpu"))
    hidden_states = model(torch.tensor([0, 1, 2, 5]), torch.arange(4))
    assert hidden_states[:, 0].tolist() == [0, 3, 2, 3]
    logits = model.compute_logits(hidden_states)
    removed = logits == float("-inf")
    assert removed.all(0).tolist() == [False, True, False, False, True, True]
    assert logits[0, [0, 2, 3]].tolist() == [0, 2, 3]


def test_rows_past_the_ensembles_are_cut_off():
    member = TableMember(torch.arange(16.0).view(4, 4), width=2)
    model = fitted(member, MemberVocabulary(3, 4, (), 0), torch.device("cpu"))
    logits = model.compute_logits(model(torch.tensor([1]), torch.arange(1)))
    assert logits.tolist() == [[4, 5, 6]]


def test_a_member_that_has_everything_is_left_as_it_is():
    member = TableMember(torch.zeros(4, 4), width=2)
    assert fitted(member, MemberVocabulary(4, 4, (), 0), torch.device("cpu")) is member
    assert not isinstance(member, FittedMember)
