"""The prompt of a row and the answers to it: all text, or all messages."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.files import DataError
from pipeline.data.messages import (
    Message,
    Text,
    check_roles,
    field_error,
    is_given,
    parse_string,
    parse_weights,
    type_name,
)
from pipeline.data.transcripts import AFTER_BLANK_LINE, as_turn, is_talk, opens_transcript, parse_text_or_messages

SURE = 10  # characters of a prompt that no answer begins with by chance


def parse_answers(where: str, fields: dict[str, Any], names: Sequence[str]) -> tuple[Text, list[Text]]:
    """The prompt ('' if there is none) and the answers in the fields `names`, all text or all messages.

    An answer may be a whole conversation, which then holds the prompt. A text prompt of answers that are messages is a
    turn of the user, a text answer to messages one of the assistant.
    """
    prompt = parse_given_prompt(where, fields)
    answers = [parse_text_or_messages(where, fields, name) for name in names]
    for name, answer in zip(names, answers, strict=True):
        if type(answer) is not type(answers[0]):
            raise DataError(
                f"{where}: {name}: expected the type of {names[0]}, {type_name(answers[0])}, got {type_name(answer)}"
            )
    if isinstance(prompt, str) and "system" not in fields and all(isinstance(answer, str) for answer in answers):
        return prompt, take_prompt_off(where, prompt, dict(zip(names, map(str, answers), strict=True)))
    talks = [talk_of(where, fields, name, answer) for name, answer in zip(names, answers, strict=True)]
    if any(talk[:-1] != talks[0][:-1] for talk in talks):
        raise DataError(f"{where}: {names[0]}: expected the conversation of {names[1]} with another last answer")
    history = talks[0][:-1] if talks else []
    if isinstance(prompt, str):
        prompt = as_turn(where, "prompt", "user", prompt) if prompt else []
    if not prompt and not history:
        raise DataError(f"{where}: prompt: no such field, and no conversation before the answer; expected a prompt")
    whole = join_history(where, prompt, history)
    whole = with_system(where, fields, whole)
    check_roles(where, "prompt", whole, last="user")
    return whole, [talk[-1:] for talk in talks]


def parse_given_prompt(where: str, fields: dict[str, Any]) -> Text:
    """The prompt of `messages` (all but an answer at their end), else of `prompt`; '' if there is neither."""
    if "messages" in fields:
        messages = parse_conversation(where, fields)
        return messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return parse_text_or_messages(where, fields, "prompt") if "prompt" in fields else ""


def parse_conversation(where: str, fields: dict[str, Any]) -> list[Message]:
    """The row's `messages` with its system message; DataError where its `prompt` is another than theirs."""
    messages = parse_text_or_messages(where, fields, "messages")
    if isinstance(messages, str):
        raise field_error(where, fields, "messages", "a list of messages")
    messages = with_system(where, fields, messages)
    ends_with_user = messages[-1:] and messages[-1]["role"] == "user"
    check_roles(where, "messages", messages, last="user" if ends_with_user else "assistant")
    if is_given(fields.get("prompt")):
        prompt = parse_text_or_messages(where, fields, "prompt")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return join_history(where, prompt, messages if ends_with_user else messages[:-1]) + (
            [] if ends_with_user else messages[-1:]
        )
    return messages


def talk_of(where: str, fields: dict[str, Any], name: str, answer: Text) -> list[Message]:
    """An answer as messages: a whole conversation, or the last message of one alone."""
    if isinstance(answer, str):
        if (
            isinstance(fields.get("prompt"), str)
            and is_talk(where, fields, "prompt")
            and AFTER_BLANK_LINE.search(answer)
        ):
            raise DataError(f"{where}: {name}: holds more turns (Human:, Assistant:) than one answer; write messages")
        return as_turn(where, name, "assistant", answer)
    if [message["role"] for message in answer] != ["assistant"]:
        check_roles(where, name, answer, last="assistant")
    if not trained_answers(where, fields, name)[-1]:
        raise DataError(f"{where}: {name}: the answer has weight 0, so it is not to be trained; leave the row out")
    return answer


def trained_answers(where: str, fields: dict[str, Any], name: str) -> list[bool]:
    """For each answer of a conversation whether it is trained. DataError if none is."""
    value = fields[name]
    trained = [True] if isinstance(value, str) and opens_transcript(value) else parse_weights(where, fields, name)
    if not any(trained):
        raise DataError(f"{where}: {name}: every answer has weight 0, so none is to be trained; leave the row out")
    return trained


def join_history(where: str, prompt: list[Message], history: list[Message]) -> list[Message]:
    """What is said before an answer, where a row says it twice: in its prompt and in a whole conversation.

    The prompt is either all of it, or the user's first or last turn in it. DataError where it is neither.
    """
    if not prompt or not history:
        return prompt or history
    said, turns = without_system(prompt), without_system(history)
    users = [message["content"].strip() for message in turns if message["role"] == "user"]
    is_turn = [message["role"] for message in said] == ["user"] and said[0]["content"].strip() in (users[0], users[-1])
    if said != turns and not is_turn:
        raise DataError(
            f"{where}: prompt: another than in the row's conversation; leave one out, for example --columns prompt="
        )
    opening = prompt[: len(prompt) - len(said)]
    return with_system(where, {"system": opening[0]["content"]} if opening else {}, history)


def without_system(messages: list[Message]) -> list[Message]:
    return messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages


def with_system(where: str, fields: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, opened by the row's system message if it has one; DataError where they are opened by another."""
    if not is_given(fields.get("system")):
        return messages
    system = parse_string(where, fields, "system").strip()
    if without_system(messages) is messages:
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system:
        raise DataError(
            f"{where}: system: another than the conversation's own system message; leave it out, for example "
            "--columns system="
        )
    return messages


def take_prompt_off(where: str, prompt: str, answers: dict[str, str]) -> list[Text]:
    """The answers, each without the prompt where all of them begin with it.

    Raises DataError where that may be by chance: the prompt is short, or only one of two answers begins with it.
    """
    repeating = [name for name, answer in answers.items() if prompt and repeats(answer, prompt)]
    if not repeating:
        return list(answers.values())
    rest = {name: answer[len(prompt) :] for name, answer in answers.items()}
    if len(repeating) < len(answers) or len(prompt.strip()) < SURE or not all(map(str.strip, rest.values())):
        raise DataError(
            f"{where}: {repeating[0]}: begins with the prompt itself, and would stand there twice; take it off"
        )
    return list(rest.values())


def repeats(answer: str, prompt: str) -> bool:
    """Whether the answer begins with the prompt, and if that is short not in the middle of a word."""
    goes_on = prompt[-1].isalnum() and answer[len(prompt) :][:1].isalnum()
    return answer.startswith(prompt) and (len(prompt.strip()) >= SURE or not goes_on)
