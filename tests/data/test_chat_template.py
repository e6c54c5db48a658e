"""Which template renders a conversation, and what is said of one that cannot."""

import copy
import json

import pytest
from templates import templated
from trl import chat_template_utils

from pipeline.config.dials import Reading
from pipeline.data import chat_template
from pipeline.data.chat_template import (
    TRANSCRIPT_TEMPLATE,
    chat_segments,
    conversation_check,
    ensure_chat_template,
)
from pipeline.data.files import DataError
from pipeline.data.form import check_form, say_template_unused
from pipeline.data.formats import read_rows
from pipeline.data.tokenizer import train_tokenizer

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer("bpe", ["Human: Assistant: a cat"], 280)


def talk(*contents, system=""):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + turns


# limits


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            r"is not done with a conversation of user after 0\.2 seconds",
        ),
        ("{% for a in range(10**9) %}{{ a }}{% endfor %}", "fails on a conversation of user: Range too big"),
        ("{{ 'a' * 2**32 }}", "takes more than 64 MiB for a conversation of user"),
        ("{{ 'a' * 10001 }}", "writes 10,001 characters for a conversation"),
        ("{{ 1 + 'a' }}", "fails on a conversation of user: unsupported operand"),
        ("{% if %}", "refuses a conversation of user: Expected an expression"),
    ],
)
def test_a_template_has_an_end(plain, template, says, monkeypatch):
    monkeypatch.setattr(chat_template, "RENDERING_SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "RENDERING_MEMORY", 2**26)
    monkeypatch.setattr(chat_template, "MOST_ADDED", 9_990)
    with pytest.raises(DataError, match=rf"chat template {says}.*--chat_template FILE"):
        chat_segments(templated(plain, template), talk("a?", "b"))


# rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_conversation_that_the_template_refuses_is_an_error_of_its_row(plain, tmp_path, capsys):
    tokenizer = templated(plain, GEMMA)
    rows = [{"messages": talk("a?", "b")}] * 30 + [{"messages": talk("a?", "b", system="Be kind.")}]
    file = write(tmp_path / "rows.jsonl", rows)
    check = conversation_check(tokenizer, "completion")
    says = r"rows\.jsonl: row 31: the tokenizer's chat template refuses a conversation of system, user: System role not"
    with pytest.raises(DataError, match=says):
        read_rows(file, "completion", check=check)
    assert len(read_rows(file, "completion", reading=Reading(bad_rows="drop"), check=check)) == 30
    assert "row 31: the tokenizer's chat template refuses" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_each_answer_of_a_pair_is_checked(plain, side):
    tokenizer = templated(plain, "{% for m in messages %}{{ m.content[0] + eos_token }}{% endfor %}")
    row = {"prompt": talk("a?"), "chosen": talk("b")[:1], "rejected": talk("c")[:1]}
    conversation_check(tokenizer, "chosen", "rejected")(row)
    with pytest.raises(DataError, match="refuses a conversation of user"):
        conversation_check(tokenizer, "chosen", "rejected")(row | {side: [{"role": "user", "content": ""}]})


def test_the_first_conversation_gives_the_template_and_text_needs_none(plain, capsys):
    tokenizer = copy.deepcopy(plain)
    check = conversation_check(tokenizer)
    check({"prompt": "text"})
    assert tokenizer.chat_template is None
    check({"prompt": talk("a?")})
    check({"prompt": talk("a?")})
    assert tokenizer.chat_template == TRANSCRIPT_TEMPLATE
    assert capsys.readouterr().out.count("no chat template") == 1


# families


def test_a_template_that_rewrites_earlier_answers_gives_way_to_trls(plain, capsys):
    qwen3 = templated(plain, chat_template_utils.qwen3_chat_template)
    qwen3.add_special_tokens({"eos_token": "<|im_end|>"})
    messages = talk("a?", "b", "c?", "d")
    with pytest.raises(DataError, match="otherwise when it goes on"):
        chat_segments(qwen3, messages)
    ensure_chat_template(qwen3, [{"prompt": messages[:3]}])
    assert qwen3.chat_template == chat_template_utils.qwen3_training_chat_template
    assert "TRL's training template of its family is used" in capsys.readouterr().out
    answers = [qwen3.decode(ids) for ids, is_answer in chat_segments(qwen3, messages) if is_answer]
    assert answers == [f"<think>\n\n</think>\n\n{text}<|im_end|>" for text in "bd"]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
def test_a_template_that_keeps_beginnings_stays(plain, name, capsys):
    template = getattr(chat_template_utils, f"{name}_chat_template")
    tokenizer = templated(plain, template)
    ensure_chat_template(tokenizer, [{"prompt": talk("a?")}])
    assert tokenizer.chat_template == template
    assert not capsys.readouterr().out


def test_an_unknown_one_that_rewrites_stays_and_its_rows_are_refused(plain):
    template = "{{ messages|length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = templated(plain, template)
    ensure_chat_template(tokenizer, [{"prompt": talk("a?")}])
    assert tokenizer.chat_template == template
    with pytest.raises(DataError, match="cannot be told apart; give another with --chat_template FILE"):
        chat_segments(tokenizer, talk("a?", "b"))


# form


def test_rows_have_one_form():
    text, conversation = {"prompt": "a"}, {"prompt": talk("a?")}
    assert check_form([text, text], "f", {"sft": "text", "reward": ""}) == "text"
    assert check_form([conversation], "f", {"sft": "conversation"}) == "conversation"
    with pytest.raises(DataError, match=r"f: 1 of its 3 rows are conversations, the others are text"):
        check_form([text, conversation, text], "f", {})
    with pytest.raises(DataError, match=r"f: the form of its rows is text, that of sft is conversation: .*messages"):
        check_form([text], "f", {"reward": "", "sft": "conversation"})


@pytest.mark.parametrize(
    ("template", "form", "is_said"), [(GEMMA, "text", True), (GEMMA, "conversation", False), (None, "text", False)]
)
def test_a_template_that_is_not_used_is_said(plain, template, form, is_said, capsys):
    say_template_unused(templated(plain, template), form)
    assert ("chat template is not used" in capsys.readouterr().out) == is_said
