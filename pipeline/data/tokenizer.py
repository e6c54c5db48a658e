"""Tokenizers: trained, or loaded with a padding token of their own, and compared by their hash."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline.config.errors import UserError
from pipeline.runtime.console import print_main
from pipeline.runtime.hashing import hash_value

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"


class ModelError(UserError):
    """A model or tokenizer that cannot be used; the message says what is expected."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with distinct pad, bos and eos, trained on texts: byte-level BPE, characters or words.

    It puts bos before every text; `data.tokenize` puts eos after it. Byte-level BPE (Radford et al. 2019) encodes every
    text; `char` and `word` map what they have not seen to <unk>.
    """
    special = [PAD, BOS, EOS]
    if kind == "bpe":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
        # A piece is a character, or a word with the space before it: joined without a separator they are the text.
        piece = Regex(r"[\s\S]") if kind == "char" else Regex(r"\s?\S+|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(piece, behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=[*special, UNKNOWN], show_progress=False
        )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    unknown = {} if kind == "bpe" else {"unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left", **unknown
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id, with a padding token that is not EOS.

    Where there is none, an existing special token that no text contains becomes the padding token: embeddings are never
    resized, and masks are made from lengths, so any will do. ModelError without EOS, or without such a token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no tokenizer can be loaded from it: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no EOS token, so a response could never end; set eos_token in it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = spare_tokens(tokenizer)
        if not spare:
            raise ModelError(f"{path}: its tokenizer has no special token to spare for padding; set pad_token in it")
        tokenizer.pad_token = spare[0]
        print_main(f"{path}: its tokenizer has no padding token of its own: '{spare[0]}' is taken")
    return tokenizer


def spare_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that neither text nor chat template uses: named for padding first, then reserved, then unknown."""
    used = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.unk_token_id in tokenizer("\u0378 \U0001f9ff")["input_ids"]:
        used.add(tokenizer.unk_token)
    template = str(tokenizer.chat_template or "")
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in used and token.content not in template
    ]
    likely = ("pad", "reserved", "unused", "unk")
    return sorted(names, key=lambda name: min((i for i, part in enumerate(likely) if part in name.lower()), default=9))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the special ids, 12 hex digits."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hash_value([sorted(tokenizer.get_vocab().items()), special])[:12]


def load_shared_tokenizer(paths: Mapping[str, str | Path]) -> PreTrainedTokenizerBase:
    """The tokenizer that all the models share: the first one's. ModelError if the tokenizers differ."""
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    hashes = {name: hash_tokenizer(tokenizer) for name, tokenizer in tokenizers.items()}
    if len(set(hashes.values())) > 1:
        listing = ", ".join(f"{name} {hashes[name]} ({paths[name]})" for name in hashes)
        raise ModelError(f"tokenizers differ: {listing}; make every stage from one base model")
    return next(iter(tokenizers.values()))
