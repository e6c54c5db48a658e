"""Where text becomes tokens: labels, chat templates, padding; the oracle is a character tokenizer by hand."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import templated
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import is_chat_template_stop_token_trained
from trl.data_utils import apply_chat_template

from pipeline.data.chat_template import TRANSCRIPT_TEMPLATE, chat_segments, ensure_chat_template, join_segments
from pipeline.data.files import DataError
from pipeline.data.formats import PARSERS
from pipeline.data.tokenize import (
    IGNORE_INDEX,
    completion_rows,
    language_rows,
    pad_rows,
    preference_rows,
    prompt_batch,
    prompt_ids,
    show_example,
    show_prompt,
    styled_row,
    text_ids,
)
from pipeline.data.tokenizer import train_tokenizer

LETTERS = "abcdef "
IDS = {letter: 3 + i for i, letter in enumerate(LETTERS)}  # <pad> 0, <bos> 1, <eos> 2


@pytest.fixture(scope="module")
def tokenizer():
    """One id per letter, <bos> before a text and nothing after it."""
    fast = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, **IDS}, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def ids(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


GOOD = {"prompt": "ab", "completion": " cd"}


def test_prompt_and_completion_join_as_ids(tokenizer):
    assert prompt_ids(tokenizer, ["ab", "e"]) == [[1, *ids("ab")], [1, *ids("e")]]
    assert text_ids(tokenizer, ["ab", ""], [" cd", "f"]) == [[1, *ids("ab cd"), 2], [1, *ids("f"), 2]]
    assert language_rows(tokenizer, ["ab", "c"])["input_ids"] == [[1, *ids("ab"), 2], [1, *ids("c"), 2]]


def test_apart_and_together_differ_under_bpe_and_the_reward_model_reads_sfts_ids():
    """A merge may cross from prompt to completion; SFT, reward and PPO must all read the ids joined, never re-cut."""
    bpe = train_tokenizer("bpe", ["abcd " * 50, "ab cd abcd " * 50], 280)
    prompt, completion = "ab", "cd abcd"
    [joined] = text_ids(bpe, [prompt], [completion])
    assert joined != [*bpe(prompt + completion)["input_ids"], bpe.eos_token_id]  # else this test shows nothing
    assert joined == [
        bpe.bos_token_id,
        *bpe(prompt, add_special_tokens=False)["input_ids"],
        *bpe(completion, add_special_tokens=False)["input_ids"],
        bpe.eos_token_id,
    ]
    row = {"prompt": prompt, "completion": completion, "chosen": completion, "rejected": "ab", "margin": 0.0}
    assert completion_rows(bpe, [row], 99, "error")[0]["input_ids"][0] == joined
    assert preference_rows(bpe, [row], 99, "error")[0]["chosen_ids"][0] == joined
    assert bpe.decode(joined, skip_special_tokens=True) == prompt + completion


def test_loss_lies_on_the_completion_and_its_eos_alone(tokenizer):
    rows, longer = completion_rows(tokenizer, [GOOD, {"prompt": "a", "completion": "bbb"}], 20, "error")
    assert longer == 0
    assert rows["input_ids"] == [[1, *ids("ab cd"), 2], [1, *ids("abbb"), 2]]
    assert rows["labels"] == [[IGNORE_INDEX] * 3 + [*ids(" cd"), 2], [IGNORE_INDEX] * 2 + [*ids("bbb"), 2]]


ROWS = [GOOD, {"prompt": "a", "completion": "bb"}, {"prompt": "abcdef", "completion": "ab"}]  # 7, 5 and 10 tokens


@pytest.mark.parametrize(("max_length", "kept"), [(10, [0, 1, 2]), (9, [0, 1]), (7, [0, 1]), (6, [1]), (5, [1])])
def test_too_long_rows_are_dropped_whole_and_counted(tokenizer, max_length, kept):
    tokens, longer = completion_rows(tokenizer, ROWS, max_length, "drop")
    assert tokens["input_ids"] == text_ids(tokenizer, *([ROWS[i][f] for i in kept] for f in ("prompt", "completion")))
    assert longer == len(ROWS) - len(kept)


def test_too_long_rows_keep_their_first_tokens_where_something_is_learned_from_them(tokenizer):
    tokens, longer = completion_rows(tokenizer, ROWS, 6, "cut")
    assert tokens["input_ids"] == [[1, *ids("ab cd")], [1, *ids("abb"), 2]]  # of the third only prompt would be left
    assert tokens["labels"][0] == [IGNORE_INDEX] * 3 + ids(" cd")
    assert longer == 2
    sides = {"prompt": "a", "margin": 0.0}
    pairs = [{**sides, "chosen": "bbbc", "rejected": "bbbd"}, {**sides, "chosen": "cdef", "rejected": "b"}]
    tokens, longer = preference_rows(tokenizer, pairs, 5, "cut")
    assert (tokens["chosen_ids"], tokens["rejected_ids"]) == (
        [[1, *ids("acde")]],
        [[1, *ids("ab"), 2]],
    )  # the first: equal
    assert longer == 2


def test_a_too_long_row_may_be_an_error(tokenizer):
    with pytest.raises(DataError, match=r"usable row 3 has 10 tokens, max_length is 9: .*--too_long"):
        completion_rows(tokenizer, ROWS, 9, "error")


def test_all_rows_too_long_is_an_error(tokenizer):
    with pytest.raises(DataError, match="max_length = 4"):
        completion_rows(tokenizer, [GOOD], 4, "drop")
    with pytest.raises(DataError, match="max_length = 4"):
        preference_rows(tokenizer, [{"prompt": "", "chosen": "a", "rejected": "abcdef", "margin": 0.0}], 4, "drop")


def test_a_pair_is_dropped_when_either_side_is_too_long(tokenizer):
    rows = [
        {"prompt": "", "chosen": "abc", "rejected": "f", "margin": 2.0},
        {"prompt": "", "chosen": "abcd", "rejected": "f", "margin": 0.0},
        {"prompt": "", "chosen": "f", "rejected": "abcd", "margin": 0.0},
        {"prompt": "ab", "chosen": "c", "rejected": "", "margin": 0.0},
    ]
    pairs, longer = preference_rows(tokenizer, rows, 5, "drop")
    assert longer == 2
    assert pairs["chosen_ids"] == [[1, *ids("abc"), 2], [1, *ids("abc"), 2]]
    assert pairs["rejected_ids"] == [[1, *ids("f"), 2], [1, *ids("ab"), 2]]
    assert pairs["margin"] == [2.0, 0.0]


def test_the_first_row_is_shown_with_its_loss(tokenizer, capsys):
    rows, _ = completion_rows(tokenizer, [GOOD], 20, "error")
    show_example(tokenizer, rows[0]["input_ids"], rows[0]["labels"])
    shown = capsys.readouterr().out.replace(" ", "")
    assert shown == "firstrow,losson[[]]:<bos>ab[[cd<eos>]]\n"


# conversations


@pytest.fixture(scope="module")
def chars():
    """Characters of a conversation, one id each."""
    return train_tokenizer("char", ["Human: Assistant: abcdefghijklmnopqrstuvwxyz <|im_start|>\n?.!"], 90)


@pytest.fixture(scope="module")
def chat(chars):
    return templated(chars, TRANSCRIPT_TEMPLATE)


TALK = [("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "so?"), ("assistant", "no!")]
TALK = [{"role": role, "content": content} for role, content in TALK]


def spelled(tokenizer, pieces):
    return [(tokenizer.decode(ids), answer) for ids, answer in pieces]


def test_a_conversation_is_cut_at_its_answers(chat):
    assert spelled(chat, chat_segments(chat, TALK)) == [
        ("<bos>be kind\n\nHuman: hi\n\nAssistant:", False),
        (" yes<eos>", True),
        ("\n\nHuman: so?\n\nAssistant:", False),
        (" no!<eos>", True),
    ]
    assert spelled(chat, chat_segments(chat, TALK[:2])) == [("<bos>be kind\n\nHuman: hi\n\nAssistant:", False)]
    assert spelled(chat, chat_segments(chat, TALK[:4]))[-1] == ("\n\nHuman: so?\n\nAssistant:", False)


def test_a_conversations_ids_are_the_same_in_sft_reward_and_ppo(chat):
    prompt, answer = TALK[:4], TALK[4:]
    [prompt_tokens], [whole] = prompt_ids(chat, [prompt]), text_ids(chat, [prompt], [answer])
    assert whole[: len(prompt_tokens)] == prompt_tokens
    assert chat.decode(whole) == chat.apply_chat_template(TALK, tokenize=False).removesuffix("\n\n")
    row = {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": TALK[2:3], "margin": 0.0}
    assert completion_rows(chat, [row], 999, "error")[0]["input_ids"] == [whole]
    assert preference_rows(chat, [row], 999, "error")[0]["chosen_ids"] == [whole]
    tokens, mask = prompt_batch(chat, [prompt, "hi"], 999)
    assert tokens[0].tolist() == prompt_tokens
    assert tokens[1][mask[1]].tolist() == chat("hi")["input_ids"]


@pytest.mark.parametrize(
    ("every_turn", "trained"),
    [
        (False, " no!<eos>"), (True, " yes<eos> no!<eos>"), ([False, True], " no!<eos>"), ([True, False], " yes<eos>"),
    ],
)  # fmt: skip
def test_loss_lies_on_the_last_answer_on_every_one_or_on_those_that_the_row_marks(chat, every_turn, trained):
    row = {"prompt": TALK[:4], "completion": TALK[4:], "every_turn": every_turn}
    [example] = completion_rows(chat, [row], 999, "error")[0]
    learned = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORE_INDEX]
    assert chat.decode(learned) == trained
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(example["input_ids"], example["labels"], strict=True))


def test_the_plain_template_passes_trls_checks_and_trls_splitting_agrees(chat):
    assert is_chat_template_stop_token_trained(chat)
    parts = apply_chat_template({"prompt": TALK[:4], "completion": TALK[4:]}, chat)
    assert parts["prompt"] == chat.decode(prompt_ids(chat, [TALK[:4]])[0])
    assert parts["completion"].rstrip() == chat.decode(chat_segments(chat, TALK)[-1][0])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_of_its_own_is_used_and_its_line_break_is_no_part_of_the_answer(chars):
    chatml = templated(chars, CHATML)
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    assert spelled(chatml, chat_segments(chatml, TALK[1:4])) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n", False),
    ]
    assert (
        join_segments(chat_segments(chatml, TALK[1:4]))
        == chatml(
            chatml.apply_chat_template(TALK[1:4], tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "closes no answer with EOS"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
            "renders a conversation otherwise",
        ),
        ("{{ raise_exception('no system, please') }}", "refuses a conversation of system, user.*no system, please"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(chars, template, says):
    with pytest.raises(DataError, match=says):
        chat_segments(templated(chars, template), TALK)


def test_a_conversation_without_a_template_is_refused(chars):
    with pytest.raises(DataError, match="to a tokenizer without a chat template"):
        prompt_ids(chars, [TALK[:2]])


def test_a_tokenizer_without_a_template_gets_one_only_for_conversations(chars, capsys):
    bare = copy.deepcopy(chars)
    ensure_chat_template(bare, [{"prompt": "a"}])
    assert bare.chat_template is None
    ensure_chat_template(bare, [{"prompt": "a"}, {"prompt": TALK[:2]}])
    assert bare.chat_template == TRANSCRIPT_TEMPLATE
    assert "no chat template" in capsys.readouterr().out
    chatml = templated(chars, CHATML)
    ensure_chat_template(chatml, [{"prompt": TALK[:2]}])
    assert chatml.chat_template == CHATML


# what people wrote stays text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.sampled_from(["a", " ", "<eos>", "<bos>", "<pad>", "<", "eos>", "\ue000", "1", "\ue001"]), max_size=6
    )
)
def test_text_that_spells_a_special_token_stays_text(words, bpe_chat):
    """Every special id is one that we or the template put there, and the text comes back as it was written."""
    text = "x" + "".join(words)
    special = set(bpe_chat.all_special_ids)
    [plain] = prompt_ids(bpe_chat, [text])
    assert not special & set(plain[1:])
    assert bpe_chat.decode(plain[1:]) == text
    assert text_ids(bpe_chat, [text], [text])[0] == [*plain, *plain[1:], bpe_chat.eos_token_id]
    prompt, answer = [{"role": "user", "content": text}], [{"role": "assistant", "content": text}]
    whole = text_ids(bpe_chat, [prompt], [answer])[0]
    assert [i for i in whole if i in special] == [bpe_chat.bos_token_id, bpe_chat.eos_token_id]
    assert bpe_chat.decode(whole) == f"<bos>Human: {text}\n\nAssistant: {text}<eos>"


WORDS = st.lists(
    st.sampled_from(
        ["a", " ", "é", "日🙂", "\n\n", "Human:", "Assistant: ", "<eos>", "<bos>", "[[", "\ue0001\ue001", ""]
    ),
    max_size=5,
).map("".join)
TEXT_ROWS = st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS})
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": WORDS}), max_size=3)
TALK_ROWS = st.builds(
    lambda system, turns: {
        "messages": [{"role": "system", "content": text} for text in system]
        + [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    },
    st.lists(WORDS, max_size=1),
    st.lists(st.tuples(WORDS, WORDS), max_size=3),
)
PROMPT_ROWS = st.fixed_dictionaries(
    {
        "prompt": MESSAGES,
        "completion": st.lists(st.fixed_dictionaries({"role": st.just("assistant"), "content": WORDS})),
    }
)


def spelled_row(row):
    """What SFT should read of a parsed row: each piece of text, and whether it is trained."""
    if isinstance(row["prompt"], str):
        return [("<bos>" + row["prompt"], False), (row["completion"] + "<eos>", True)]
    messages = [*row["prompt"], *row["completion"]]
    pieces = [("<bos>", False)]
    for number, message in enumerate(messages):
        text, is_last = message["content"], number == len(messages) - 1
        if message["role"] == "assistant":
            trained = bool(is_last or row.get("every_turn"))
            pieces += [("Assistant:", False), (f" {text}<eos>", trained), ("" if is_last else "\n\n", False)]
        else:
            pieces.append((("Human: " if message["role"] == "user" else "") + text + "\n\n", False))
    return pieces


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=TEXT_ROWS | TALK_ROWS | PROMPT_ROWS)
def test_a_row_trains_what_is_shown_of_it_or_is_refused_by_name(fields, bpe_chat):
    try:
        row = PARSERS["completion"](("rows.jsonl: row 3", fields))
    except DataError as error:
        assert str(error).startswith("rows.jsonl: row 3: ")  # noqa: PT017  # either is right
        return
    [example] = completion_rows(bpe_chat, [row], 10**6, "error")[0]
    tokens, labels = example["input_ids"], example["labels"]
    pieces = spelled_row(row)
    assert bpe_chat.decode(tokens) == "".join(text for text, _ in pieces)
    learned = [token for token, label in zip(tokens, labels, strict=True) if label != IGNORE_INDEX]
    assert bpe_chat.decode(learned) == "".join(text for text, is_trained in pieces if is_trained)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(tokens, labels, strict=True))
    shown = "".join(f"[[{text}]]" if is_trained else text for text, is_trained in pieces)
    assert styled_row(bpe_chat, tokens, labels).plain == shown


def test_a_prompt_is_shown_as_it_is_sent(bpe_chat, capsys):
    show_prompt(bpe_chat, TALK[:2], 99)
    show_prompt(bpe_chat, "so what", 3)
    first, second = capsys.readouterr().out.split("first prompt, as it is sent: ")[1:]
    assert first == "<bos>be kind\n\nHuman: hi\n\nAssistant:\n"
    assert second == bpe_chat.decode(bpe_chat("so what")["input_ids"][-3:]) + "\n"


@pytest.fixture(scope="module")
def bpe_chat():
    return templated(train_tokenizer("bpe", ["Human: Assistant: a cat"], 280), TRANSCRIPT_TEMPLATE)


@pytest.mark.parametrize("pad_id", [0, 7])  # 7 is a token of the texts: a mask of `ids != pad` would hide it
def test_padding_is_known_by_length(pad_id):
    rows = [[7, 5, 7], [7], [4, 7, 0, 6]]
    left, left_mask = pad_rows(rows, pad_id, "left")
    right, right_mask = pad_rows(rows, pad_id, "right")
    p = pad_id
    assert left.tolist() == [[p, 7, 5, 7], [p, p, p, 7], [4, 7, 0, 6]]
    assert right.tolist() == [[7, 5, 7, p], [7, p, p, p], [4, 7, 0, 6]]
    assert left_mask.tolist() == [[False, True, True, True], [False, False, False, True], [True] * 4]
    assert right_mask.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]
    assert (left.dtype, left_mask.dtype) == (torch.long, torch.bool)


def test_prompts_are_padded_on_the_left_and_keep_their_end(tokenizer):
    tokens, mask = prompt_batch(tokenizer, ["abcdef", "f", ""], 4)
    assert tokens.tolist() == [ids("cdef"), [0, 0, 1, *ids("f")], [0, 0, 0, 1]]
    assert mask.sum(1).tolist() == [4, 2, 1]
    assert mask[:, -1].all()
    whole, _ = prompt_batch(tokenizer, ["abcdef", "f"], 99)
    assert whole[0].tolist() == [1, *ids("abcdef")]
