"""benchmarks/adapter_arithmetic.py: its rows are what its page says, its verdicts follow from the figures, and it finds
its place in the page; docs/adapter-arithmetic.md has what it gives."""

import adapter_arithmetic
import finding_data
import finding_report
import pytest


def test_the_halves_are_skewed_to_opposite_sides_and_together_they_are_all():
    one, two = finding_data.split_in_halves(1)
    assert sorted([*one, *two]) == sorted(finding_data.read_labelled_texts("train", "rt", 1, finding_data.ROWS))
    assert not set(one) & set(two)
    negative = [sum(label == "negative" for _, label in half) / len(half) for half in (one, two)]
    assert negative == pytest.approx([0.8, 0.2], abs=0.01)
    assert finding_data.split_in_halves(1) == (one, two) != finding_data.split_in_halves(2)


def test_splits_of_the_texts_share_none():
    train, validation, test = (
        {text for text, _ in finding_data.read_labelled_texts(s, "rt", 0, 10**6)}
        for s in ("train", "validation", "test")
    )
    assert not train & validation | train & test | validation & test


def test_a_text_is_cut_after_three_words():
    row = finding_data.to_completions([("  a b c, d\ne", "positive")])[0]
    assert row == {"prompt": "  a b c,", "completion": " d\ne"}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([1.0, 1.1, 0.9], "yes"), ([-1.0, -1.1, -0.9], "no: the opposite"), ([1.0, -1.0, 0.5], "not shown")],
)
def test_a_claim_is_shown_where_the_interval_leaves_zero(differences, expected):
    assert finding_report.verdict(finding_report.mean_with_interval(differences)) == expected
    assert finding_report.verdict(finding_report.mean_with_interval(differences[:1])) == "one seed says nothing"


def test_a_report_judges_the_claims_it_has_figures_for(tmp_path, monkeypatch):
    figures = {
        seed: {"exact, one start": 2.0, "factor-wise, one start": 2.5 + seed / 100, "factor-wise, two starts": 3.0}
        for seed in (1, 2, 3)
    }
    result = finding_report.make_report(adapter_arithmetic.FINDINGS["initialisation"][1], figures, 7.2, "the command")
    assert [(row["claim"], row["outcome"]) for row in result["claims"]] == [
        ("factor-wise: one start beats two", "yes"), ("one start: exact beats factor-wise", "yes"),
    ]  # fmt: skip
    page = tmp_path / "page.md"
    marks = ("<!-- initialisation: written by benchmarks/adapter_arithmetic.py -->", "<!-- end of initialisation -->")
    page.write_text("\n".join(["before", marks[0], "old", marks[1], "after", ""]))
    monkeypatch.setattr(finding_report, "PAGE", page)
    for _ in range(2):
        finding_report.write_into_page("initialisation", finding_report.format_section(result))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert text.count("| factor-wise: one start beats two | 0.480 [0.455, 0.505] |") == 1


def test_every_finding_has_its_place_in_the_page():
    page = finding_report.PAGE.read_text(encoding="utf-8")
    for name in adapter_arithmetic.FINDINGS:
        assert page.count(f"<!-- {name}: written by benchmarks/adapter_arithmetic.py -->") == 1
        assert page.count(f"<!-- end of {name} -->") == 1
