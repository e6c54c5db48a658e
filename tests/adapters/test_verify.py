"""Composed adapters made anew from their parents."""

import json
import shutil

import pytest
from adapter_factory import (
    change_one_bit,
    edit_tensors,
)

from pipeline.adapters.reading import hash_adapter_files
from pipeline.adapters.verify import verify
from pipeline.config.commands import Verify
from pipeline.config.errors import UserError


def test_verify_makes_it_anew_also_where_it_was_moved(factory, tmp_path):
    inside = tmp_path / "first"
    for name in ("plain", "rslora"):
        shutil.copytree(factory.adapter(name), inside / name)
    folders = {"a": inside / "plain", "b": inside / "rslora"}
    shutil.copytree(factory.bases["llama"], inside / "base")
    out = factory.compose("a - 0.1*b", folders=folders, base=str(inside / "base"), out=str(inside / "made"))
    assert verify(Verify(adapter=str(out), prompts_file=""))["error"] == 0
    moved = inside.rename(tmp_path / "second")
    assert verify(Verify(adapter=str(moved / "made"), prompts_file=""))["error"] == 0
    (moved / "plain").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"adapter 'a': .*no such folder"):
        verify(Verify(adapter=str(moved / "made"), prompts_file=""))
    dials = {"adapter": str(moved / "made"), "prompts_file": "", "adapters": f"a={tmp_path / 'elsewhere'}"}
    assert verify(Verify(**dials))["error"] == 0
    with pytest.raises(UserError, match=r"adapter 'a': .*not the file that .* was made from \(sha256 differs\)"):
        verify(Verify(**dials | {"adapters": f"a={moved / 'rslora'}"}))
    edit_tensors(moved / "made", change_one_bit)
    with pytest.raises(UserError, match="not as it was written"):
        verify(Verify(**dials))
    lineage = json.loads((moved / "made" / "composition.json").read_text())
    lineage["files"] = hash_adapter_files(moved / "made")  # forged, so only making it anew can tell
    (moved / "made" / "composition.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match="made anew from its parents it differs by"):
        verify(Verify(**dials))


def test_verify_wants_a_composed_adapter(factory):
    with pytest.raises(UserError, match="no adapter made by compose"):
        verify(Verify(adapter=str(factory.adapter("plain"))))
