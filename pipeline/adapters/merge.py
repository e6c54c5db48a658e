"""Command merge: an adapter and its base become one plain model, proved equal to the two before it is written."""

import os
from dataclasses import asdict
from pathlib import Path

from torch import nn

from pipeline.adapters.base import AdapterError
from pipeline.adapters.lineage import read_lineage, write_lineage
from pipeline.adapters.proof import check_proof, format_proof, load_unmerged, prove_adapter, read_probes
from pipeline.adapters.reading import read_adapters
from pipeline.adapters.writing import DTYPES, atomic_folder, require_new_folder
from pipeline.config.commands import MergeAdapter
from pipeline.models.loading import merge_adapter, unwrap_peft
from pipeline.models.saving import save_policy
from pipeline.runtime.console import print_main, silence_libraries


def merge(config: MergeAdapter) -> Path:
    """Writes base and adapter as one plain model, merged as proved, and returns its folder."""
    silence_libraries()
    out = require_new_folder(config.out)
    if not config.adapter:
        raise AdapterError("adapter: say which folder to merge")
    folder = Path(config.adapter)
    adapters, base = read_adapters({"adapter": folder}, config.base)
    adapter = adapters["adapter"]
    prompts = read_probes(config.probe_file, base.tokenizer)
    proof = prove_adapter(folder, base, adapter.update, adapter.heads, config.dtype, prompts, folder)
    check_proof(proof, config.allow_drift)
    model = merge_adapter(unwrap_peft(load_unmerged(base.model, folder)))
    nn.Module.to(model, DTYPES[config.dtype])
    with atomic_folder(out) as temporary:
        if base.task == "CAUSAL_LM":
            save_policy(model, base.tokenizer, temporary)
        else:
            model.save_pretrained(temporary)
            base.tokenizer.save_pretrained(temporary)
        lineage = read_lineage(folder) | {
            "merged": {
                "path": os.path.relpath(folder.resolve(), out.resolve()),
                "sha256": adapter.sha256,
                "base": base.fingerprint,
                "dtype": config.dtype,
                "proof": asdict(proof) | {"prompts": len(prompts)},
            }
        }
        write_lineage(temporary, lineage)
    print_main(f"merge: {folder} -> {out}")
    print_main(format_proof(proof))
    return out
