"""Tokenizers with a chat template of a test's own."""

import copy


def templated(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other
