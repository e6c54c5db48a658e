"""Tokenizers: trained, or loaded with an end and a padding of their own, and compared by their hash."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline.config.dials import Tokens
from pipeline.config.errors import UserError
from pipeline.runtime.console import print_main
from pipeline.runtime.hashing import hash_value

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
BYTE_PAD = "<|pad|>"
"""What the entry of a byte is called where it becomes the padding token."""
NO_TEXT = [*range(0xF5, 0x100), 0xC0, 0xC1]
"""Bytes that no UTF-8 has (RFC 3629). Each has an entry in a byte-level vocabulary, `chr(byte)`, that no text gives."""


class ModelError(UserError):
    """A model or tokenizer that cannot be used; the message says what is expected."""


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def loading_error(path: str | Path, what: str, error: Exception) -> ModelError:
    """Why transformers cannot load a `what`; code that lies beside it is never run."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{path}: its {what} is Python code that lies beside it (auto_map), which is never run: give one that "
            "transformers has itself"
        )
    return ModelError(f"{path}: no {what} can be loaded from it: {first_line(error)}")


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


def load_tokenizer(path: str | Path, dials: Tokens = Tokens()) -> PreTrainedTokenizerBase:
    """A saved tokenizer as the dials say, with an EOS, and with a padding token that is not EOS.

    Raises ModelError without EOS, or for one that is no token of it.
    """
    tokenizer = read_tokenizer(path)
    if dials.eos_token:
        set_eos(tokenizer, dials.eos_token, path)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: its tokenizer has no EOS token, so a response could never end; say which token ends one: "
            f"--eos_token, of {', '.join(special_names(tokenizer)) or 'none: it has no special token'}"
        )
    if dials.chat_template:
        tokenizer.chat_template = read_template(dials.chat_template)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        set_padding(tokenizer, path)
    return tokenizer


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """A saved tokenizer as it is; ModelError where there is none. An adapter without one has its base's."""
    folder, file = Path(path), Path(path) / "adapter_config.json"
    if file.is_file() and not (folder / "tokenizer_config.json").is_file():
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base:
            return read_tokenizer(base)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise loading_error(path, "tokenizer", error) from None


def read_template(file: str) -> str:
    """The text of a chat template's file; ModelError for one that cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"chat_template: {file}: expected a jinja file in UTF-8: {first_line(error)}") from None


def hash_template(dials: Tokens) -> list[tuple[str, str]]:
    """The chat template that a dial names, with a hash of its text, as `StageRun` records the data of a stage."""
    return [(dials.chat_template, hash_value(read_template(dials.chat_template)))] if dials.chat_template else []


def set_eos(tokenizer: PreTrainedTokenizerBase, name: str, path: str | Path) -> None:
    """Has texts and answers end with this token; ModelError for one that the tokenizer reads as text, or not at all."""
    names = special_names(tokenizer)
    if name not in names:
        raise ModelError(
            f"eos_token: '{name}' is no special token of {path}; those that it has are {', '.join(names) or 'none'}"
        )
    tokenizer.add_special_tokens({"eos_token": name})


def special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of the tokens that are read whole: special ones, and those added to the vocabulary."""
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def set_padding(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Takes a padding token from the vocabulary, and says which: embeddings are never resized.

    Masks are made from lengths, so any id would do for them. Two things ask for more: sampling and scoring leave the
    padding out of the policy's distribution, so no response should need it; and transformers' own sequence classifiers
    score a row at its last id that is not the padding, so no row may end with it. Taken is, in turn: a special token
    that neither text nor template uses; a byte that no text has (GPT-2's vocabulary is of bytes), whose entry is
    renamed, so that the letter of its name stays text; the last entry, the rarest one of a trained vocabulary.
    """
    entry = tokenizer.convert_ids_to_tokens(max(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    if spare := spare_tokens(tokenizer):
        tokenizer.pad_token, why = spare[0], "which no text uses"
    elif (byte := unused_byte(tokenizer)) is not None:
        rename_entry(tokenizer, chr(byte), BYTE_PAD)
        tokenizer.add_special_tokens({"pad_token": BYTE_PAD})
        why = f"the byte {byte:#x}, which no text has"
    else:
        tokenizer.pad_token, why = str(entry), "its last entry, which no response will have"
    print_main(f"{path}: its tokenizer has no padding token of its own: '{tokenizer.pad_token}' is taken, {why}")


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


def unused_byte(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A byte that no text has and that is in no merge, of a vocabulary with an entry for every byte; else None."""
    vocab = tokenizer.get_vocab()
    if BYTE_PAD in vocab or not set(pre_tokenizers.ByteLevel.alphabet()) <= vocab.keys():
        return None
    free = (byte for byte in NO_TEXT if sum(chr(byte) in name for name in vocab) == 1)
    return next(free, None)


def rename_entry(tokenizer: PreTrainedTokenizerBase, name: str, new: str) -> None:
    """Gives an entry of a BPE vocabulary another name, in place; its id stays."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab[new] = vocab.pop(name)
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], opens: bool = False) -> list[list[int]]:
    """Ids of texts in which no special token is read; `opens` puts first what the tokenizer opens a text with (BOS)."""
    opening = opening_ids(tokenizer) if opens else []
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    return [[*opening, *row] for row in ids]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord; what it may put after one is not for a prompt."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(probe["input_ids"], probe["special_tokens_mask"], strict=True)
    return [index for index, _ in takewhile(lambda pair: pair[1], marked)]


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the special ids, 12 hex digits."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hash_value([sorted(tokenizer.get_vocab().items()), special])[:12]


def load_shared_tokenizer(paths: Mapping[str, str | Path], dials: Tokens = Tokens()) -> PreTrainedTokenizerBase:
    """The tokenizer of all the models: that of the first which a stage has made, else of the first, as the dials say.

    All must have the same vocabulary. What the stages have made, and a reward model, must also begin and end texts
    alike, and the stages' chat templates must be one; of the `base` weights alone are used. ModelError where they
    differ, or where a dial contradicts a stage.
    """
    made = [name for name, path in paths.items() if (Path(path) / "DONE.json").is_file() and name != "base"]
    owner = made[0] if made else next(iter(paths))
    if made:
        check_dials(paths[owner], dials)
    shared = load_tokenizer(paths[owner], Tokens() if made else dials)
    tokenizers = {name: shared if name == owner else read_tokenizer(path) for name, path in paths.items()}
    renamed = {tokenizer.get_vocab().get(BYTE_PAD) for tokenizer in tokenizers.values()}
    vocabularies = [
        {index: token for token, index in tokenizer.get_vocab().items() if index not in renamed}
        for tokenizer in tokenizers.values()
    ]
    bound = [tokenizers[name] for name in paths if name in (owner, "reward", *made)]
    ends = {(tokenizer.bos_token_id, tokenizer.eos_token_id) for tokenizer in bound}
    listing = ", ".join(f"{name} {hash_tokenizer(tokenizers[name])} ({path})" for name, path in paths.items())
    if any(vocabulary != vocabularies[0] for vocabulary in vocabularies) or len(ends) > 1:
        raise ModelError(f"tokenizers differ: {listing}; make every stage from one base model")
    if len({str(tokenizers[name].chat_template) for name in made}) > 1:
        raise ModelError(f"chat templates differ: {listing}; make every stage from one SFT policy")
    return shared


def check_dials(path: str | Path, dials: Tokens) -> None:
    """ModelError where the dials say another EOS or chat template than a stage has been trained with."""
    tokenizer = read_tokenizer(path)
    if dials.eos_token not in ("", tokenizer.eos_token):
        raise ModelError(
            f"eos_token: {path} was trained with '{tokenizer.eos_token}', not '{dials.eos_token}': leave eos_token out"
        )
    if dials.chat_template and read_template(dials.chat_template) != tokenizer.chat_template:
        raise ModelError(f"chat_template: {path} was trained with another than {dials.chat_template}: leave it out")
