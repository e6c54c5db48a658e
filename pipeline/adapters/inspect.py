"""Command inspect: an adapter's ranks, scales, norms and lineage, and its cosine with another."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.adapters.base import AdapterBase, AdapterError
from pipeline.adapters.lineage import read_lineage
from pipeline.adapters.reading import read_adapters
from pipeline.adapters.updates import Factors, ModuleUpdate, cosine, frobenius_norm, update_norm
from pipeline.config.commands import Inspect
from pipeline.runtime.console import print_main, silence_libraries


def inspect(config: Inspect) -> dict[str, Any]:
    """Prints and returns what an adapter is: rank, norm and size beside its base's weight, by module; and its lineage.

    With `against`, the cosine between the two as well: near 1, they are one adapter twice.
    """
    silence_libraries()
    if not config.adapter:
        raise AdapterError("adapter: say which folder to look at")
    folders = {"adapter": Path(config.adapter)} | ({"against": Path(config.against)} if config.against else {})
    adapters, base = read_adapters(folders, config.base)
    adapter = adapters["adapter"]
    report = {
        "kind": adapter.config["peft_type"],
        "rank": adapter.config.get("r"),
        "alpha": adapter.config.get("lora_alpha"),
        "rslora": adapter.config.get("use_rslora"),
        "base": base.fingerprint,
        "heads": sorted(adapter.heads),
        "norm": update_norm(adapter.update),
        "modules": {module: describe_module(part, base, module) for module, part in adapter.update.items()},
        "lineage": read_lineage(adapter.folder),
    }
    print_main(
        f"{adapter.folder}: {report['kind']}, rank {report['rank']}, alpha {report['alpha']}, rslora {report['rslora']}"
    )
    print_main(f"base {base.path} (weights {base.fingerprint[:12]}); norm {report['norm']:.4g}")
    if report["lineage"]:
        print_main(f"made from {report['lineage']['expression']} ({report['lineage']['method']})")
    other = adapters["against"].update if config.against else {}
    if other:
        report["cosine"] = cosine(adapter.update, other)
        print_main(f"cosine with {config.against}: {report['cosine']:.4f}")
    for module, figures in report["modules"].items():
        if module in other:
            figures["cosine"] = cosine({module: adapter.update[module]}, {module: other[module]})
        print_main("  ".join([module, *(f"{name} {figure:.4g}" for name, figure in figures.items())]))
    return report


def describe_module(part: ModuleUpdate, base: AdapterBase, module: str) -> dict[str, float]:
    """LoRA: rank, norm of dW and its share of the weight's norm; IA3: entries of l, norm of l - 1, mean of l."""
    if isinstance(part, Factors):
        norm = frobenius_norm(part)
        weight = base.model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        return {"rank": float(part.rank), "norm": norm, "of_weight": norm / weight.norm().item()}
    return {"entries": float(len(part.l)), "norm": (part.l - 1).norm().item(), "mean": part.l.mean().item()}
