"""The dials of the commands of stages/merge.py that combine adapters."""

import dataclasses

from pipeline.config.dials import JUDGED, SOURCES, Reading, Sampling, dial
from pipeline.config.errors import ConfigError

DTYPE = "type of the weights that are written; fp32 is exact, the others are measured against it"
DRIFT = "write although rounding to dtype, or merging, changes more than 5 % of what the adapter does"
PROBES = "rows with `prompt`: merged, unmerged and mixed from the parents must agree on them"
BASE = "model that the adapters were trained on; empty: the one in their folders"


@dataclasses.dataclass(frozen=True)
class Compose:
    """A new adapter, made from others by an expression: `compose "sft + 0.5*helpful - 0.3*toxic"`."""

    expression: str = dial("", "sum of adapters by their names (docs/adapter-arithmetic.md); stands first, unnamed")
    adapters: str = dial("", "what the names mean: name=folder,name=folder")
    out: str = dial("", "folder to write, not there yet")
    base: str = dial("", BASE)
    rank: int = dial(0, "ranks of the result at most; 0: as many as it needs", low=0)
    max_loss: float = dial(0.01, "share of |dW|^2 that `rank` may cost any module", low=0, high=1)
    max_rank: int = dial(512, "refuse a result of more ranks (vLLM serves up to 512)", low=1)
    heads: str = dial(
        "refuse",
        "whole layers trained beside the adapters: refused, the first adapter's, or base + sum of weighted differences",
        choices=("refuse", "first", "sum"),
    )
    dtype: str = dial("fp32", DTYPE, choices=("fp32", "bf16", "fp16"))
    allow_drift: bool = dial(False, DRIFT)
    probe_file: str = dial("data/imdb/ppo/validation.jsonl", PROBES)


@dataclasses.dataclass(frozen=True)
class MergeAdapter:
    """A plain model from an adapter and its base: `merge runs/x/composed`."""

    adapter: str = dial("", "folder of the adapter, composed or any other; stands first, unnamed")
    out: str = dial("", "folder to write, not there yet")
    base: str = dial("", BASE)
    dtype: str = dial("fp32", DTYPE, choices=("fp32", "bf16", "fp16"))
    allow_drift: bool = dial(False, DRIFT)
    probe_file: str = dial("data/imdb/ppo/validation.jsonl", PROBES)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """What an adapter is: `inspect runs/x/composed`."""

    adapter: str = dial("", "folder of the adapter; stands first, unnamed")
    against: str = dial("", "another adapter: the cosine between the two, module by module")
    base: str = dial("", BASE)


@dataclasses.dataclass(frozen=True)
class Verify:
    """A composed adapter made anew from its parents, and what they and it write: `verify runs/x/composed`."""

    adapter: str = dial("", "folder of the composed adapter; stands first, unnamed", usual=True)
    adapters: str = dial("", "parents that have moved: name=folder,name=folder", usual=True)
    base: str = dial("", BASE)
    prompts_file: str = dial(
        "data/imdb/ppo/validation.jsonl", "`prompt` rows that parents and result answer; empty: none", usual=True
    )
    prompts: int = dial(64, "how many prompts", low=2, usual=True)
    reading: Reading = Reading()
    judge_file: str = dial("", "a second judge is fitted to these rows: " + JUDGED)
    seed: int = dial(0, "seed of sampling", low=0)
    sampling: Sampling = Sampling()


MEASURES = ("loss", "accuracy", "reward", "vader", "classifier")


@dataclasses.dataclass(frozen=True)
class Search:
    """Numbers for an expression's variables, found without training: `search "sft + $x*good" --range x=0:1.5`."""

    expression: str = dial(
        "", "sum of adapters with $variables (docs/adapter-arithmetic.md); stands first, unnamed", usual=True
    )
    adapters: str = dial("", "what the names mean: name=folder,name=folder", usual=True)
    range: str = dial("", "where each variable may lie: x=0:1.5,y=-1:1", usual=True)
    out: str = dial("", "folder to write, not there yet", usual=True)
    base: str = dial("", BASE)
    objective: str = dial(
        "loss",
        "what is made best: loss of completions (nats per token), accuracy (the chosen of a pair is the likelier), or "
        "of sampled responses the reward model's score, VADER's compound or the fitted classifier's P(positive)",
        choices=MEASURES,
        usual=True,
    )
    constraints: str = dial(
        "",
        "what must hold meanwhile: `perplexity <= 1.05*base, kl <= 6`; base is the model without adapters; objectives "
        "and repetition may be named too",
        usual=True,
    )
    also: str = dial("", "comma-separated measures, as in constraints, that decide nothing and are reported")
    validation_file: str = dial(
        "", "`prompt` + `completion` (loss), pairs (accuracy), else `prompt`: " + SOURCES, usual=True
    )
    test_file: str = dial("", "rows as in validation_file and none of them; measured once, at the end", usual=True)
    retain_file: str = dial("", "`text` of the perplexity: " + SOURCES)
    retain_test_file: str = dial("", "rows as in retain_file and none of them; measured once, at the end")
    reference: str = dial("base", "expression that kl is measured from: the policy before alignment")
    reward: str = dial("", "reward model, for the objective reward")
    judge_file: str = dial("", "the classifier is fitted to these rows: " + JUDGED)
    rows: int = dial(0, "use the first n rows of each file; 0: all", low=0)
    max_length: int = dial(128, "longest row; a longer one is left out, of retain_file cut", low=4)
    budget: int = dial(25, "trials at most", low=1, usual=True)
    grid: int = dial(0, "how many of them lie on a grid, the others where it was best; 0: half of them", low=0)
    batch_size: int = dial(64, "sequences per forward", low=1)
    reading: Reading = Reading()
    seed: int = dial(0, "seed of sampling, the same noise in every trial", low=0)
    sampling: Sampling = Sampling()

    def check(self) -> None:
        if self.grid > self.budget:
            raise ConfigError(f"grid ({self.grid}) is more than budget ({self.budget}); lower grid or raise budget")
