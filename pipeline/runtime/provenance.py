"""Where a stage comes from: its parents by content, the versions and the code that made it, and what has changed."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from pipeline.runtime.finished import StageError, verify_files
from pipeline.runtime.hashing import hash_folder, hash_value

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "wandb", "tokenizers")


def describe_parent(path: Path, final: Path) -> dict[str, Any]:
    """A parent's fingerprint, size in bytes, and path relative to this stage's `final/`, so that runs/ may move.

    A parent is a stage's output, whose files are compared with its DONE.json, or any model: a directory with a
    config.json, an adapter alone that names its base, or the name of a model on the hub.
    """
    is_stage = (path / "DONE.json").is_file() or path.name == "final"
    if not is_stage and (path / "config.json").is_file():
        fingerprint = hash_folder(path)
    elif not is_stage and (path / "adapter_config.json").is_file():
        fingerprint = hash_value([hash_folder(path), base_fingerprint(path, final)])
    elif not is_stage and not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        return {"path": str(path), "place": str(path), "fingerprint": hub_commit(str(path)), "bytes": 0}
    else:
        fingerprint = verify_files(path)["fingerprint"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    relative_path = os.path.relpath(path.resolve(), final.resolve())
    return {"path": relative_path, "place": str(path), "fingerprint": fingerprint, "bytes": size}


def base_fingerprint(adapter: Path, final: Path) -> str:
    """Of the base that an adapter names; '' where it names none, which its loading refuses."""
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return describe_parent(Path(base), final)["fingerprint"] if base else ""
    except (StageError, ValueError) as error:
        raise StageError(
            f"{adapter}: an adapter whose base (base_model_name_or_path) cannot be used: {error}; or run `python "
            f"stages/merge.py merge {adapter} --base … --out …` and start from what that writes"
        ) from None


def hub_commit(model: str) -> str:
    """The commit that a hub model's main branch is at now; StageError where the hub gives none."""
    try:
        return str(HfApi().model_info(model).sha)
    except (OSError, ValueError) as error:  # no network, an HTTP error, a name that cannot be one
        raise StageError(
            f"{model}: no such folder, and the hub does not give a model of that name ({type(error).__name__}); give a "
            "stage's final/, a model's folder, or a hub name with the network on"
        ) from None


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first difference between two identities (`StageRun.identity`), in words: a dial, a parent, or the data."""
    for name in sorted({*old["dials"], *new["dials"]}):
        was, now = old["dials"].get(name, "absent"), new["dials"].get(name, "absent")
        if was != now:
            return f"{name}: {was} then, {now} now"
    for name in sorted({*old["parents"], *new["parents"]}):
        if name not in new["parents"] or name not in old["parents"]:
            return f"its parent {name}: {'used' if name in old['parents'] else 'absent'} then, not so now"
        if old["parents"][name] != new["parents"][name]:
            return f"its parent {name} was made anew since"
    return "its data files differ"


def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}


def git_revision() -> str:
    """HEAD of the repository this code lies in, with '+' when it has uncommitted changes; '' outside git."""
    git = shutil.which("git")
    if git is None:
        return ""
    folder = Path(__file__).parent
    head = subprocess.run([git, "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        [git, "-C", folder, "--no-optional-locks", "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else ""
