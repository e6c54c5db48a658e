"""The page's figures from hand-made responses: numpy and scipy say what each must be."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import seeds
from scipy import stats

from pipeline.evaluate import PolicyResponses, compare, headline, health, without_silent_vader
from pipeline.evaluation.report import HEADER, markdown_page, markdown_table, table_rows, write_report
from pipeline.evaluation.statistics import share_ci

N = 24
PROMPTS = [f"Opening {i} of" for i in range(N)]
SUBJECTS = ("dragon", "kitchen", "planet", "violin", "harbour", "lantern", "meadow", "teapot")
LEVEL = {"base": -0.7, "sft": 0.1, "ppo": 0.9}


def responses(name: str, seed: int) -> PolicyResponses:
    """Texts of the same few words and numbers that no two policies share."""
    random = np.random.default_rng(seed)
    texts = [f" the {SUBJECTS[i % 8]} was {name} and it was number {i} tonight" for i in range(N)]
    return PolicyResponses(
        texts=texts,
        score=LEVEL[name] + random.normal(size=N),
        vader=np.tanh(LEVEL[name] + random.normal(size=N)),
        classifier=1 / (1 + np.exp(-LEVEL[name] - random.normal(size=N))),
        kl=random.gamma(2.0, 1.0 + LEVEL[name], size=N),
        length=random.integers(5, 20, size=N).astype(float),
        has_eos=np.arange(N) % 3 == 0,
        base_nll=random.uniform(20, 60, size=N),
    )


class Judge:
    holdout_accuracy = share_ci([1.0] * 13 + [0.0] * 3)


@pytest.fixture(scope="module")
def measured() -> dict[str, PolicyResponses]:
    return {name: responses(name, seed) for seed, name in enumerate(("base", "sft", "ppo"))}


@pytest.fixture(scope="module")
def report(measured):
    return compare(measured, PROMPTS, Judge())


@pytest.mark.parametrize("name", ["score", "vader", "classifier"])
def test_a_difference_is_ppo_minus_sft_with_its_paired_interval(measured, report, name):
    ppo, sft = getattr(measured["ppo"], name), getattr(measured["sft"], name)
    expected = stats.ttest_rel(ppo, sft).confidence_interval(0.95)
    got = report["ppo_against_sft"][name]["difference"]
    assert got["value"] == pytest.approx(ppo.mean() - sft.mean())
    assert got["value"] > 0.1  # the crooked fixture: a wrong sign would show
    assert (got["low"], got["high"]) == pytest.approx((expected.low, expected.high))
    assert report["ppo_against_sft"][name]["win_rate"]["value"] == pytest.approx(np.mean(ppo > sft))
    slope, at_zero = np.polyfit(measured["ppo"].length - measured["sft"].length, ppo - sft, 1)
    assert report["ppo_against_sft"][name]["at_equal_length"]["value"] == pytest.approx(at_zero)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("policy", ["base", "sft", "ppo"])
def test_each_policys_figures_are_its_own(measured, report, policy):
    own, got = measured[policy], report["policies"][policy]
    for name in ("score", "vader", "classifier", "kl", "length"):
        assert got[name]["value"] == pytest.approx(getattr(own, name).mean())
        low, high = stats.t.interval(0.95, N - 1, getattr(own, name).mean(), stats.sem(getattr(own, name)))
        assert (got[name]["low"], got[name]["high"]) == pytest.approx((low, high))
    assert got["eos_share"]["value"] == pytest.approx(1 / 3)
    tokens = own.length.sum() - N / 3  # EOS aside
    assert got["perplexity_under_base"] == pytest.approx(math.exp(own.base_nll.sum() / tokens))
    assert got["score_length_correlation"] == pytest.approx(stats.pearsonr(own.score, own.length).statistic)


BEFORE = {
    "text": {
        "word_repetition": 0.1,
        "distinct_4": 0.9,
        "duplicate_share": 0.0,
    },
    "perplexity_under_base": 20.0,
    "kl": {"value": 0.0},
}


def health_of(**changes: float):
    """The health of a policy whose figures are perfect but for the given ones."""
    figures = {"kl": 4.0, "repetition": 0.1, "share": 0.1, "distinct": 0.9, "duplicates": 0.0, "perplexity": 20.0}
    figures |= changes
    after = {
        "text": {
            "word_repetition": figures["repetition"],
            "distinct_4": figures["distinct"],
            "duplicate_share": figures["duplicates"],
        },
        "perplexity_under_base": figures["perplexity"],
        "kl": {"value": figures["kl"]},
    }
    return health(BEFORE, after, ("wonderful", figures["share"]))


@pytest.mark.parametrize(
    ("figure", "inside", "outside", "row"),
    [
        ("kl", [0.0, -0.5, 9.99], [10.01], 0),
        ("repetition", [0.0, 0.149], [0.151], 1),
        ("share", [0.0, 0.2], [0.201], 2),
        ("distinct", [0.721, 1.0], [0.719], 3),
        ("duplicates", [0.0, 0.02], [0.021], 4),
        ("perplexity", [14.1, 25.9], [13.9, 26.1], 5),
    ],
)
def test_health_has_bounds_on_both_sides(figure, inside, outside, row):
    for value in inside:
        assert all(line["healthy"] for line in health_of(**{figure: value}))
    for value in outside:
        lines = health_of(**{figure: value})
        assert [i for i, line in enumerate(lines) if not line["healthy"]] == [row]


@pytest.mark.parametrize("figure", ["kl", "repetition", "share", "distinct", "duplicates", "perplexity"])
def test_what_is_not_a_number_is_not_healthy(figure):
    assert sum(not line["healthy"] for line in health_of(**{figure: math.nan})) == 1


def test_the_headline_repeats_the_report(measured, report):
    metrics = headline(report)
    assert metrics["ppo_score"] == pytest.approx(measured["ppo"].score.mean())
    assert metrics["base_classifier"] == pytest.approx(measured["base"].classifier.mean())
    assert metrics["vader_difference"] == pytest.approx((measured["ppo"].vader - measured["sft"].vader).mean())
    assert metrics["kl"] == pytest.approx(measured["ppo"].kl.mean())
    assert metrics["healthy"] == float(all(row["healthy"] for row in report["health"]))
    sick = copy.deepcopy(report)
    for row in sick["health"]:
        row["healthy"] = True
    assert headline(sick)["healthy"] == 1.0
    sick["health"][3]["healthy"] = False
    assert headline(sick)["healthy"] == 0.0


def test_every_row_shows_its_numbers_under_their_policy(measured, report):
    rows = {row[0]: row[1:] for row in table_rows(report)}
    policies = [measured[name] for name in ("base", "sft", "ppo")]
    texts = [report["policies"][name]["text"] for name in ("base", "sft", "ppo")]
    for title, name, form in (
        ("reward", "score", "+.3f"),
        ("judge 1: VADER compound", "vader", "+.3f"),
        ("judge 2: P(positive)", "classifier", ".3f"),
        ("KL to SFT, nats per response", "kl", ".2f"),
        ("length, tokens", "length", ".1f"),
        ("ended by EOS", "has_eos", ".3f"),
    ):
        assert rows.pop(title)[:3] == tuple(format(getattr(p, name).mean(), form) for p in policies)
    for short, name in (("reward", "score"), ("judge 1", "vader"), ("judge 2", "classifier")):
        wins = np.mean(getattr(measured["ppo"], name) > getattr(measured["sft"], name))
        assert rows.pop(f"PPO beats SFT by {short}")[:3] == ("", "", f"{wins:.3f}")
    assert rows.pop("perplexity under base")[:3] == tuple(f"{p.perplexity:.1f}" for p in policies)
    for title, name in (
        ("distinct-1", "distinct_1"),
        ("distinct-2", "distinct_2"),
        ("distinct-4", "distinct_4"),
        ("word repetition in a response", "word_repetition"),
        ("exact duplicates", "duplicate_share"),
    ):
        assert rows.pop(title)[:3] == tuple(f"{text[name]:.3f}" for text in texts)
    words = [text["commonest_content_words"][0] for text in texts]
    assert rows.pop("commonest content word, share")[:3] == tuple(f"{word} {share:.3f}" for word, share in words)
    assert rows == {}


def test_intervals_stand_beside_their_rows(measured, report):
    rows = {row[0]: row[4] for row in table_rows(report)}
    interval = stats.ttest_rel(measured["ppo"].score, measured["sft"].score).confidence_interval(0.95)
    value = (measured["ppo"].score - measured["sft"].score).mean()
    assert rows["reward"] == f"{value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    rate = report["ppo_against_sft"]["score"]["win_rate"]
    assert rows["PPO beats SFT by reward"] == f"[{rate['low']:.3f}, {rate['high']:.3f}]"


SAMPLES = [
    {
        "prompt": "One",
        "base": " b\n\nb",
        "sft": " s",
        "ppo": " p",
        "base_score": -1.5,
        "sft_score": 0.0,
        "ppo_score": 2.25,
    }
]


def tables(text: str) -> list[list[list[str]]]:
    """The page's tables as rows of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


def test_the_page_holds_every_number_and_its_tables_are_whole(report):
    text = markdown_page(report, SAMPLES)
    found = tables(text)
    assert [len(table) - 2 for table in found] == [len(table_rows(report)), 3, len(report["health"])]
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert set(cell.strip() for cell in table[1]) == {"---"}
    assert tuple(cell.strip() for cell in found[0][0]) == HEADER
    assert [tuple(cell.strip() for cell in row) for row in found[0][2:]] == table_rows(report)
    for row, line in zip(found[2][2:], report["health"], strict=True):
        assert row[1].strip() == f"{line['value']:.3g}"
        assert row[3].strip() == ("ok" if line["healthy"] else "**outside**")
    for name, cells in zip(("score", "vader", "classifier"), found[1][2:], strict=True):
        estimate = report["ppo_against_sft"][name]["at_equal_length"]
        assert cells[0].strip() == name
        assert cells[1].strip() == f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
    assert f"{13 / 16:.3f} [" in text
    assert f"{N} held-out prompts" in text
    assert "- base (-1.50): b b\n- sft (+0.00): s\n- ppo (+2.25): p" in text


def test_a_bar_in_a_cell_does_not_make_a_column():
    lines = markdown_table(("a", "b"), [("x|y", "z")])
    assert lines == ["| a | b |", "| --- | --- |", "| x\\|y | z |"]


def test_what_is_written_reads_back(report, tmp_path):
    write_report(report, SAMPLES, tmp_path)
    back = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert (
        markdown_page(back, SAMPLES)
        == (tmp_path / "evaluation.md").read_text(encoding="utf-8")
        == markdown_page(report, SAMPLES)
    )


def test_the_page_over_seeds_has_every_seed_policy_and_interval(report):
    def seed(shift: float) -> dict:
        test = {name: {"value": value + shift} for name, value in accuracies.items()}
        stages = {"pretrain": {"validation_loss": 4 + shift, "bits_per_byte": 1.8}, "sft": {"validation_loss": 3.8}}
        return stages | {"reward": {"test": test}, "lora": report, "full": report}

    accuracies = {"accuracy": 0.75, "linear_baseline": 0.8, "longer_wins": 0.5}
    text = "\n".join(seeds.page([7, 8, 9], [seed(0.01), seed(0.02), seed(0.03)]))
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert f"| 0.770 [{0.77 - half:.3f}, {0.77 + half:.3f}] | 0.760, 0.770, 0.780 |" in text
    judge = report["ppo_against_sft"]["vader"]["difference"]
    assert text.count(f"{judge['value']:+.3f} [{judge['low']:+.3f}, {judge['high']:+.3f}]") == 6
    for line in ("| LoRA PPO | 7 |", "| full PPO | 9 |"):
        assert text.count(line) == 2
    outside = sum(not row["healthy"] for row in report["health"])
    assert text.count("**outside**") == 6 * outside


def test_what_cannot_be_measured_is_said_so_on_the_page(capsys, tmp_path):
    """One prompt has no interval, a length no spread, and a text without a probability no perplexity."""
    one = {
        name: PolicyResponses(
            texts=["好" * 9], score=np.ones(1), kl=np.zeros(1), length=np.ones(1), has_eos=np.ones(1, bool),
            base_nll=np.full(1, nll), classifier=np.ones(1),
        )
        for name, nll in (("base", 1.0), ("sft", 1e5), ("ppo", math.inf))
    }  # fmt: skip
    report = compare(one, ["说"], Judge())
    write_report(report, [], tmp_path)  # which is valid JSON
    rows = {row[0]: row[1:] for row in table_rows(report)}
    assert rows["perplexity under base"] == ("2.7", "not measured", "not measured", "")
    assert rows["reward"] == ("not measured",) * 4
    assert rows["ended by EOS"][:3] == ("1.000",) * 3
    assert headline(report) == {
        "base_score": None, "sft_score": None, "ppo_score": None, "score_difference": None, "kl": None, "healthy": 0.0,
        "base_classifier": None, "sft_classifier": None, "ppo_classifier": None, "classifier_difference": None,
    }  # fmt: skip
    page = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert "| perplexity under the base, over SFT's | not measured | 0.7 to 1.3 | **outside** |" in page
    assert "| score | not measured |" in page
    assert "Judge 1 is not measured: VADER's list of English words has none of the responses'" in page
    printed = " ".join(capsys.readouterr().out.split())
    assert "evaluate: ppo: perplexity under the base: not measured: the negative log-likelihood is inf" in printed
    assert "evaluate: score, difference: not measured: an interval for a mean needs at least 2 observations" in printed


@pytest.mark.parametrize(
    "words", ["the film was superb", "это было прекрасно", "这部电影很好看", "정말 훌륭한 영화", "ดีมากเลย"]
)
def test_one_word_everywhere_is_seen_in_any_script(words, measured):
    """SFT writes sentences that differ; of PPO each response is the last word of one, again and again."""
    sft = dataclasses.replace(measured["sft"], texts=[f"{words} {name} {i}" for i, name in enumerate(SUBJECTS * 3)])
    space, word = " " * (" " in words), words.rpartition(" ")[2]
    ppo = dataclasses.replace(sft, texts=[space.join([word] * 6) + f" {i}" for i in range(N)])

    def signs(policy: PolicyResponses) -> list[bool]:
        rows = compare({"base": sft, "sft": sft, "ppo": policy}, PROMPTS, Judge())["health"]
        return [row["healthy"] for row in rows if row["name"].startswith(("word repetition", "share of responses"))]

    assert signs(sft) == [True, True]
    assert not all(signs(ppo))


def test_vader_is_heard_where_it_knows_a_word_and_else_left_out(measured, capsys):
    silent = {name: dataclasses.replace(policy, vader=np.zeros(N)) for name, policy in measured.items()}
    assert all(policy.vader is None for policy in without_silent_vader(silent).values())
    assert "judge 1: not measured: VADER's list of English words" in " ".join(capsys.readouterr().out.split())
    one = silent | {"sft": measured["sft"]}
    assert without_silent_vader(one) == one
    none = {name: dataclasses.replace(policy, vader=None) for name, policy in measured.items()}
    assert without_silent_vader(none) == none
    assert capsys.readouterr().out == ""
