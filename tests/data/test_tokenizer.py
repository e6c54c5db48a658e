"""Tokenizers of popular bases, made small: no padding, an end that is not EOS, EOS after every text, no BOS."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from pipeline.config.dials import Tokens
from pipeline.data.chat_template import chat_segments
from pipeline.data.tokenize import decode, prompt_batch, prompt_ids, text_ids
from pipeline.data.tokenizer import (
    BYTE_PAD,
    NO_TEXT,
    ModelError,
    encode_plain,
    hash_template,
    hash_tokenizer,
    load_shared_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def byte_vocabulary(special):
    """A byte-level BPE as GPT-2's, its special tokens first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, user assistant yes hi ÿ ÿ"] * 3, trainer)
    return backend


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with GPT-2's kind: one special token that is BOS, EOS and unknown, and no padding."""
    state = json.loads(byte_vocabulary([END]).to_str())["model"]
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Tokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A folder with a base of ChatML, whose template ends a turn with another token than EOS."""
    folder = tmp_path_factory.mktemp("chatml")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_vocabulary([END, START, STOP]), eos_token=END, pad_token=END,
        additional_special_tokens=[START, STOP],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


# padding


def test_a_byte_that_no_text_has_becomes_gpt2s_padding(gpt2, tmp_path, capsys):
    before, tokenizer = AutoTokenizer.from_pretrained(gpt2), load_tokenizer(gpt2)
    said = capsys.readouterr().out
    assert f"'{BYTE_PAD}' is taken, the byte 0xf5, which no text has" in said
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (BYTE_PAD, before.convert_tokens_to_ids("õ"))
    assert tokenizer.eos_token_id == before.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == len(before)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert hash_tokenizer(again) == hash_tokenizer(tokenizer) == hash_tokenizer(load_tokenizer(gpt2))
    assert "is taken" not in capsys.readouterr().out.replace(said, "")
    letters = "".join(map(chr, NO_TEXT)) + "the cat"
    for saved in (tokenizer, again, AutoTokenizer.from_pretrained(tmp_path)):
        assert saved(letters)["input_ids"] == before(letters)["input_ids"]
        assert decode(saved, [*saved(letters)["input_ids"], saved.pad_token_id]) == letters


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20))
def test_no_text_has_the_padding_of_gpt2s_kind(gpt2, text):
    tokenizer = load_tokenizer(gpt2)
    [ids] = text_ids(tokenizer, [text], [BYTE_PAD])
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids) == text + BYTE_PAD + END
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_byte_that_has_a_part_in_a_merge_is_not_taken(tmp_path):
    vocab = {name: index for index, name in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "õa"])}
    GPT2Tokenizer(vocab=vocab, merges=[("õ", "a")]).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == vocab["ö"]


# the end of a turn


def test_an_end_that_is_not_eos_is_named_with_the_dial_that_mends_it(chatml):
    with pytest.raises(
        Exception, match=r"closes no answer with EOS \('<\|endoftext\|>'\).*--eos_token \"<\|im_end\|>\""
    ):
        chat_segments(load_tokenizer(chatml), TALK)


def test_the_dial_makes_the_end_of_a_turn_eos_and_is_saved(chatml, tmp_path):
    tokenizer = load_tokenizer(chatml, Tokens(eos_token=STOP))
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert (each.eos_token, each.pad_token) == (STOP, END)
        (_, is_prompt), (answer, is_answer) = chat_segments(each, TALK)
        assert (is_prompt, is_answer) == (False, True)
        assert each.decode(answer) == "yes" + STOP


def test_an_eos_that_is_no_token_is_refused_with_those_that_are(chatml):
    with pytest.raises(ModelError, match=r"eos_token: '</s>' is no special token of .*<\|im_start\|>, <\|im_end\|>"):
        load_tokenizer(chatml, Tokens(eos_token="</s>"))


def test_a_tokenizer_without_eos_is_refused_with_the_dial(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=byte_vocabulary([START, STOP])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no EOS token.*--eos_token, of <\|im_start\|>, <\|im_end\|>"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, Tokens(eos_token=STOP)).eos_token == STOP


def test_a_chat_template_of_a_file_is_used_and_part_of_what_a_stage_is_known_by(gpt2, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    dials = Tokens(chat_template=str(file))
    tokenizer = load_tokenizer(gpt2, dials)
    assert [tokenizer.decode(ids) for ids, _ in chat_segments(tokenizer, TALK)] == ["hi" + END, "yes" + END]
    [(name, first)] = hash_template(dials)
    assert name == str(file)
    file.write_text("{{ messages[0].content }}")
    assert hash_template(dials) != [(name, first)]
    assert hash_template(Tokens()) == []
    with pytest.raises(ModelError, match=r"chat_template: .*no\.jinja: expected a jinja file"):
        load_tokenizer(gpt2, Tokens(chat_template=f"{tmp_path}/no.jinja"))


# before and after a text


def chars(single, **tokens):
    """Characters, with what a post-processor puts around every text."""
    backend = train_tokenizer("char", ["abc "], 40).backend_tokenizer
    special = [(name, backend.token_to_id(name)) for name in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"pad_token": "<pad>", "eos_token": "<eos>"} | tokens)


@pytest.mark.parametrize(
    ("single", "opens", "own"),
    [("<bos> $A <eos>", [1], [1, 2]), ("$A <eos>", [], [2]), ("$A", [], []), ("<bos> $A", [1], [1])],
)
def test_a_prompt_has_what_opens_a_text_and_nothing_that_closes_one(single, opens, own):
    tokenizer = chars(single)
    a, b = encode_plain(tokenizer, ["ab", "b"])
    assert tokenizer("")["input_ids"] == own
    assert prompt_ids(tokenizer, ["ab", "b"]) == [[*opens, *a], [*opens, *b]]
    assert text_ids(tokenizer, ["ab"], ["b"]) == [[*opens, *a, *b, 2]]
    ids, mask = prompt_batch(tokenizer, ["ab", ""], 9)
    assert ids[1][mask[1]].tolist() == (opens or [2])  # with no BOS, EOS: a text begins after the one before
    assert mask.any(1).all()


# one tokenizer for all


def finished(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    (folder / "DONE.json").write_text("{}")
    return folder


def test_eos_is_sfts_whatever_the_base_says(chatml, tmp_path):
    """The dial is said once: later stages take the tokenizer of the stage before, and of the base the weights."""
    sft = finished(tmp_path, load_tokenizer(chatml, Tokens(eos_token=STOP)))
    for paths in ({"sft": sft, "base": chatml}, {"base": chatml, "sft": sft}, {"policy": chatml, "reward": sft}):
        assert load_shared_tokenizer(paths).eos_token == STOP
    assert load_shared_tokenizer({"sft": sft}, Tokens(eos_token=STOP)).eos_token == STOP
    with pytest.raises(ModelError, match=r"eos_token: .* was trained with '<\|im_end\|>', not '<\|endoftext\|>'"):
        load_shared_tokenizer({"sft": sft, "base": chatml}, Tokens(eos_token=END))


def test_of_what_no_stage_has_made_the_dial_decides(chatml):
    assert load_shared_tokenizer({"sft": chatml, "base": chatml}, Tokens(eos_token=STOP)).eos_token == STOP


def test_the_padding_of_gpt2s_kind_is_no_difference_to_its_base(gpt2, tmp_path):
    assert load_shared_tokenizer({"sft": finished(tmp_path, load_tokenizer(gpt2)), "base": gpt2}).pad_token == BYTE_PAD


@pytest.mark.parametrize(
    ("dials", "template", "says"),
    [
        (Tokens(), CHATML, "tokenizers differ: sft"),
        (Tokens(eos_token=STOP), CHATML + " ", "chat templates differ: sft"),
    ],
)
def test_stages_that_end_or_render_otherwise_are_refused(chatml, dials, template, says, tmp_path):
    sft = finished(tmp_path / "sft", load_tokenizer(chatml, Tokens(eos_token=STOP)))
    other = load_tokenizer(chatml, dials)
    other.chat_template = template
    with pytest.raises(ModelError, match=says):
        load_shared_tokenizer({"sft": sft, "reward": finished(tmp_path / "reward", other)})


def test_a_reward_model_of_elsewhere_must_end_texts_as_the_policy_does(chatml, tmp_path):
    load_tokenizer(chatml, Tokens(eos_token=STOP)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizers differ: sft"):
        load_shared_tokenizer({"sft": chatml, "reward": tmp_path})
    paths = {"sft": chatml, "reward": tmp_path}
    assert load_shared_tokenizer(paths, Tokens(eos_token=STOP)).eos_token == STOP


def test_an_adapter_alone_has_the_tokenizer_of_its_base(gpt2, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(gpt2)}))
    assert hash_tokenizer(load_tokenizer(tmp_path)) == hash_tokenizer(load_tokenizer(gpt2))
    train_tokenizer("char", ["abc"], 40).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<pad>"
