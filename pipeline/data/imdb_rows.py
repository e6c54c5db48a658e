"""The rows of the default recipe's files, cut from texts that are in splits already.

Every 'random' choice depends on the text or the file's name alone, so the same texts give the same rows.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.data.imdb_texts import RATED, Text
from pipeline.data.near_duplicates import normalise

Row = dict[str, object]

ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|st|jr|sr|vs|prof|gen|lt|col|capt|sgt|rev|[a-hj-z])\.$", re.IGNORECASE
)
BREAK = re.compile(r"[.!?]+[\"')]*\s+(?=[\"'(]*[A-Z0-9])")
UNTIDY = re.compile(  # rare characters, no space after a full stop, markup, words in capitals, web addresses
    r"[^\w\s.,;:!?'\"()&%$/\-\u2019\u2013]|[a-z][.!?,][A-Za-z]|[*_]|--|\.{4,}|[!?]{2,}|[A-Z']{4,} [A-Z']{2,}|http"
)


def hash_to_int(text: str) -> int:
    """A 64-bit number that depends on the text alone, by sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_sentences(text: str) -> list[str]:
    """The text cut after . ! or ? before a capital or digit, except after titles, abbreviations and initials."""
    sentences, start = [], 0
    for match in BREAK.finditer(text):
        if not ABBREVIATION.search(text[max(start, match.start() - 8) : match.start() + 1]):
            sentences.append(text[start : match.end()].rstrip())
            start = match.end()
    return [*sentences, text[start:]] if start < len(text) else sentences


def spans(sentences: list[str], low: int, high: int) -> list[str]:
    """Runs of whole sentences, each of low to high words, of varied lengths, without overlap and in order."""
    runs, i = [], 0
    words_before = [0, *itertools.accumulate(len(sentence.split()) for sentence in sentences)]
    while i < len(sentences):
        ends = [
            j
            for j in range(i + 1, min(i + high, len(sentences)) + 1)
            if low <= words_before[j] - words_before[i] <= high
        ]
        if ends:
            end = ends[hash_to_int(sentences[i]) % len(ends)]
            runs.append(" ".join(sentences[i:end]))
            i = end
        else:
            i += 1
    return runs


def is_balanced(text: str) -> bool:
    """Whether the text closes every double quote and bracket that it opens."""
    return text.count('"') % 2 == 0 and text.count("(") == text.count(")")


def excerpts(review: str) -> list[Row]:
    """{"prompt", "completion"} rows: 4-10 words that open a sentence, then 8-20 words to the end of a sentence.

    Only from spans that open with a capital, end in a full stop, are not UNTIDY, and pair their quotes and brackets.
    """
    rows: list[Row] = []
    for span in spans(split_sentences(review), 13, 28):
        words, opening = span.split(), len(split_sentences(span)[0].split())
        count = 4 + hash_to_int(span) % max(1, min(7, opening - 5))
        prompt, rest = " ".join(words[:count]), " ".join(words[count:])
        is_tidy = re.match(r"[A-Z].*[.!?][\"')]?$", span) and not UNTIDY.search(span)
        if is_tidy and is_balanced(prompt) and is_balanced(rest) and opening > 5 and 8 <= len(words) - count <= 20:
            rows.append({"prompt": prompt, "completion": f" {rest}"})
    return rows


def unique_rows(rows: Iterable[Row], field: str, seen: set[str]) -> Iterator[Row]:
    """The rows whose normalised field is not in `seen` yet; it is added."""
    for row in rows:
        form = normalise(str(row[field]))
        if form not in seen:
            seen.add(form)
            yield row


def preference_pairs(texts: list[Text], rounds: int, gap: float, name: str, seen: set[frozenset[str]]) -> list[Row]:
    """{"chosen", "rejected", "margin", "source": name} rows from repeated shuffles; a text is in `rounds` at most.

    Both texts are of one `Text.source`, their ratings differ by at least `gap`, and the pair is not in `seen` yet, to
    which it is added. The margin is the difference of the ratings, and 0 for imdb and rt, which have labels only.
    """
    shuffle, rows = random.Random(f"{name} {rounds}"), []
    for source in sorted({text.source for text in texts}):
        members = [text for text in texts if text.source == source and len(text.text.split()) <= 60]
        for _ in range(rounds):
            shuffle.shuffle(members)
            order = members
            if name != "ratings":
                good, bad = ([text for text in members if (text.rating > 0) == sign] for sign in (True, False))
                order = [text for both in zip(good, bad, strict=False) for text in both]
            for a, b in zip(order[::2], order[1::2], strict=False):
                better, worse = (a, b) if a.rating > b.rating else (b, a)
                difference, forms = better.rating - worse.rating, frozenset((normalise(a.text), normalise(b.text)))
                if difference >= gap and len(forms) == 2 and forms not in seen:
                    seen.add(forms)
                    margin = round(difference, 4) if name == "ratings" else 0.0
                    rows.append({"chosen": better.text, "rejected": worse.text, "margin": margin, "source": name})
    return rows


def shuffle_rows(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows in an order that depends only on their number and on the name."""
    shuffled = list(rows)
    random.Random(name).shuffle(shuffled)
    return shuffled


def reward_rows(texts: list[Text], limit: int | None, name: str) -> list[Row]:
    """Pairs of whole texts, at most `limit` of each source: rated sentences, rt sentences, and spans of reviews.

    A review's last span, which mostly has the verdict, is in two pairs and its first span in one. Spans are no longer
    than what SFT writes (prompt and completion), which is what the reward model will score. There are fewest rt
    sentences, so each is in the most pairs: the three sources then have about equally many.
    """
    reviews = [(text, spans(split_sentences(text.text), 10, 28)) for text in texts if text.source == "imdb"]
    last = [replace(text, text=cut[-1]) for text, cut in reviews if cut]
    first = [replace(text, text=cut[0]) for text, cut in reviews if len(cut) > 1]
    seen: set[frozenset[str]] = set()
    kinds = (
        preference_pairs([text for text in texts if text.source in RATED], 3, 0.5, "ratings", seen),
        preference_pairs([text for text in texts if text.source == "rt"], 6, 2.0, "rt", seen),
        preference_pairs(last, 2, 2.0, "imdb", seen) + preference_pairs(first, 1, 2.0, "imdb", seen),
    )
    return shuffle_rows((row for kind in kinds for row in shuffle_rows(kind, name)[:limit]), name)


def judge_rows(texts: list[Text]) -> list[Row]:
    """{"text", "label", "key"} rows: reviews, their spans, rt, and sentences rated -1 and below or 1 and above."""
    rows: list[Row] = []
    for text in texts:
        if abs(text.rating) >= 1:
            cut = spans(split_sentences(text.text), 10, 45) if text.source == "imdb" else []
            label = "positive" if text.rating > 0 else "negative"
            rows += [{"text": piece, "label": label, "key": text.key} for piece in [text.text, *cut]]
    return shuffle_rows(unique_rows(rows, "text", set()), "judge")


def prompt_rows(rows: list[list[Row]], limit: int, name: str, seen: set[str]) -> list[Row]:
    """At most `limit` {"prompt"} rows from each review's excerpts, none of them in `seen`."""
    flat = shuffle_rows((row for review in rows for row in review), name)
    return [{"prompt": row["prompt"]} for row in unique_rows(flat, "prompt", seen)][:limit]


def rows_by_file(parts: dict[str, list[Text]]) -> dict[str, list[Row]]:
    """Every file's rows by its name, from the texts of each split."""
    reviews = {
        split: [excerpts(text.text) for text in parts[split] if text.source == "imdb"]
        for split in ("train", "validation", "test")
    }
    files: dict[str, list[Row]] = {}
    for split, limit in (("train", 60_000), ("validation", 1_000)):
        whole_texts = unique_rows(({"text": text.text} for text in parts[split]), "text", set())
        files[f"pretrain/{split}"] = shuffle_rows(whole_texts, split)
        all_excerpts = (row for review in reviews[split] for row in review)
        files[f"sft/{split}"] = shuffle_rows(all_excerpts, f"sft/{split}")[:limit]
    seen: set[str] = set()  # test prompts first: a prompt that is in several splits stays there
    one_each = [[review[hash_to_int(str(review[0])) % len(review)]] for review in reviews["test"] if review]
    files["ppo/test"] = prompt_rows(one_each, 1_000, "ppo/test", seen)
    files["ppo/validation"] = prompt_rows(reviews["validation"], 1_000, "ppo/validation", seen)
    files["ppo/train"] = prompt_rows(reviews["train"], 20_000, "ppo/train", seen)
    for split, most in (("train", None), ("validation", 500), ("test", 1_000)):
        files[f"reward/{split}"] = reward_rows(parts[split], most, f"reward/{split}")
    files["judge/train"] = judge_rows(parts["judge"])
    return files
