import math

import pytest

from pipeline.evaluation.side_figures import show, side_figure


@pytest.mark.parametrize("error", [ValueError("too few"), OverflowError("too few"), MemoryError("too few")])
def test_a_figure_that_cannot_be_computed_is_none_and_says_why(error, capsys):
    def fails(*_):
        raise error

    assert side_figure("sft: perplexity", fails, 1) is None
    assert capsys.readouterr().out == "sft: perplexity: not measured: too few\n"
    assert side_figure("sft: perplexity", math.exp, 0.0) == 1.0
    assert capsys.readouterr().out == ""


def test_an_interruption_is_no_figure():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_figure("sft: perplexity", stop)


def test_a_figure_is_shown_by_its_value_or_in_words():
    assert [show(figure, ".2f") for figure in (1.5, {"value": 2.5, "low": 0}, None)] == ["1.50", "2.50", "not measured"]
