"""What expressions over adapters stand for, against dense matrices in float64; heads; what cannot be combined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_expressions import constants, trees, unfold
from random_updates import ADAPTERS, SCALES, assert_same, changes, lora, plus

from pipeline.adapters.algebra import combine_heads, evaluate
from pipeline.adapters.expression_parser import parse
from pipeline.adapters.expressions import Call, Name
from pipeline.adapters.operators import ties
from pipeline.adapters.updates import (
    AlgebraError,
    Factors,
    Scales,
    scaled_factors,
    to_dense,
)


def oracle(tree, adapters):
    """The expression worked out on dense changes, leaf by leaf."""
    leaves = unfold(tree)
    total = {}
    for name in dict.fromkeys(name for name, _ in leaves):
        total = plus(total, adapters[name], float(sum(weight for leaf, weight in leaves if leaf == name)))
    return total


@settings(deadline=None)
@given(trees(constants, functions=False), st.sampled_from((ADAPTERS, SCALES)))
def test_an_expression_is_the_same_sum_of_dense_changes(tree, adapters):
    expected = oracle(tree, {name: changes(update) for name, update in adapters.items()})
    size = 1 + max((float(change.abs().max()) for change in expected.values()), default=0)
    result = {m: to_dense(p) if isinstance(p, Factors) else p.l - 1 for m, p in evaluate(tree, adapters).items()}
    for module, change in expected.items():
        torch.testing.assert_close(result[module] / size, change / size, atol=1e-10, rtol=0)
    for module in result.keys() - expected.keys():
        assert not result[module].any()


def test_weights_that_cancel_leave_the_modules():
    result = evaluate(parse("a - a"), ADAPTERS)
    assert result.keys() == ADAPTERS["a"].keys()
    assert all(part.rank == 1 and not to_dense(part).any() for part in result.values())
    assert all((part.l == 1).all() for part in evaluate(parse("a - a + base"), SCALES).values())
    assert evaluate(parse("a + b - b"), ADAPTERS).keys() == {"q", "k", "down"}


def test_the_order_of_terms_changes_no_bit():
    for adapters in (ADAPTERS, SCALES):
        first, second = (evaluate(parse(text), adapters) for text in ("a + 0.3*b - sft", "-sft + 0.3*b + a"))
        for module in first:
            x, y = first[module], second[module]
            assert torch.equal(x.l, y.l) if isinstance(x, Scales) else torch.equal(x.b, y.b) and torch.equal(x.a, y.a)


def test_a_lone_adapter_is_itself_to_the_bit():
    for adapters in (ADAPTERS, SCALES):
        result = evaluate(parse("sft"), adapters)
        assert result.keys() == adapters["sft"].keys()
        for module, part in result.items():
            expected = adapters["sft"][module]
            assert (
                torch.equal(part.l, expected.l)
                if isinstance(part, Scales)
                else torch.equal(to_dense(part), to_dense(expected))
            )


def test_ia3_is_added_as_its_distance_from_one():
    x, y = torch.tensor([1.5, 0.2, -1.0]).double(), torch.tensor([0.5, 3.0, 1.0]).double()
    adapters = {"x": {"q": Scales(x, False)}, "y": {"q": Scales(y, False), "k": Scales(y, True)}}

    def vector(text, module="q"):
        return evaluate(parse(text), adapters)[module].l

    torch.testing.assert_close(vector("-x"), 2 - x)
    torch.testing.assert_close(vector("-0.4*x"), 1.4 - 0.4 * x)
    torch.testing.assert_close(vector("0.3*x + 0.7*y"), 0.3 * x + 0.7 * y)
    torch.testing.assert_close(vector("x + y"), x + y - 1)
    torch.testing.assert_close(vector("0.5*x + 0.5*y", "k"), 0.5 + 0.5 * y)  # x has no k: it is 1 there
    assert not evaluate(parse("x"), adapters)["q"].feedforward


def test_ties_and_dare_act_on_whole_updates():
    tied = evaluate(parse("ties(a, -2*b, density=0.5)"), ADAPTERS)
    for module, part in tied.items():
        whole = [
            changes({m: p for m, p in u.items() if m == module}).get(module) for u in (ADAPTERS["a"], ADAPTERS["b"])
        ]
        parts = [w * x for w, x in zip((1, -2), whole, strict=True) if x is not None]
        torch.testing.assert_close(to_dense(part), ties(parts, 0.5), atol=1e-12, rtol=0)
    dropped = evaluate(parse("dare(a, 0.75, seed=3)"), ADAPTERS)
    for module, part in dropped.items():
        whole = to_dense(ADAPTERS["a"][module])
        ratio = to_dense(part) / whole
        is_kept = (ratio - 4).abs() < 1e-9
        assert (is_kept | (ratio.abs() < 1e-9)).all()
        assert 0 < is_kept.sum() < ratio.numel()
    mixed = evaluate(parse("sft - 0.5*ties(a, b)"), ADAPTERS)
    tie = evaluate(parse("ties(a, b)"), ADAPTERS)
    expected = plus(changes(ADAPTERS["sft"]), changes(tie), -0.5)
    assert_same(changes(mixed), {m: c for m, c in expected.items() if c.abs().max() > 1e-9})


def test_ties_and_dare_of_ia3_act_on_the_distance_from_one():
    x = torch.tensor([2.0, 2.0, 0.0]).double()
    y = torch.tensor([1.5, -1.0, 1.5]).double()
    adapters = {"x": {"q": Scales(x, False)}, "y": {"q": Scales(y, False)}}
    assert evaluate(parse("ties(x, -y, density=1)"), adapters)["q"].l.tolist() == [2.0, 2.5, 0.25]
    dropped = evaluate(parse("dare(x, 0.5)"), adapters)["q"].l
    assert all(value in (1.0, 3.0, -1.0) for value in dropped.tolist())


@pytest.mark.parametrize(
    ("text", "adapters", "message"),
    [
        ("a + i", {"a": ADAPTERS["a"], "i": SCALES["a"]}, "adapter 'i' is IA3, 'a' is LoRA"),
        ("ties(a, i)", {"a": ADAPTERS["a"], "i": SCALES["a"]}, "adapter 'i' is IA3, 'a' is LoRA"),
        (
            "a + w",
            {"a": ADAPTERS["a"], "w": {"q": scaled_factors(torch.ones(6, 1), torch.ones(1, 4))}},
            "adapter 'w': q: (6, 4), but 'a' has (6, 5) there",
        ),
        (
            "i + j",
            {"i": {"q": Scales(torch.ones(3), True)}, "j": {"q": Scales(torch.ones(3), False)}},
            "adapter 'j': q: (3, 'its output'), but 'i' has (3, 'its input') there",
        ),
        ("a + b", {"a": lora(1, {"q": 2}), "b": lora(2, {"q": 2}, bias=True)}, "adapter 'a': lora_bias: it has none"),
        ("a + b", {"a": lora(1, {"q": 2}, bias=True), "b": lora(2, {"q": 2})}, "adapter 'b': lora_bias: it has none"),
        ("ties(a, a)", {"a": lora(1, {"q": 2}, bias=True)}, "lora_bias: ties has no rule for it"),
        ("paper(a + b)", ADAPTERS, "adapter 'b': paper(...) adds factors, so it needs the modules and ranks of 'a'"),
        ("paper(a + dare(a, 0.5))", ADAPTERS, "paper(...): dare(a, p=0.5, seed=0): it adds adapters only"),
        ("paper(0*a + 0*sft)", ADAPTERS, "its weights sum to 0"),
        ("paper(-a)", {"a": lora(1, {"q": 2}, bias=True)}, "adapter 'a': lora_bias: paper(...) has no rule"),
    ],
)
def test_what_cannot_be_combined(text, adapters, message):
    with pytest.raises(AlgebraError) as refused:
        evaluate(parse(text), adapters)
    assert message in str(refused.value)


HEADS = {"a": {"score.weight": torch.tensor([[1.0, 2.0]])}, "b": {"score.weight": torch.tensor([[5.0, -2.0]])}, "c": {}}


@pytest.mark.parametrize(
    ("text", "rule", "base", "expected"),
    [
        ("b + 0.5*a", "first", None, [[5.0, -2.0]]),
        ("c + 0.5*a", "first", None, [[1.0, 2.0]]),
        ("0.25*a + 0.75*b", "sum", None, [[4.0, -1.0]]),
        ("a - 2*b", "sum", [[1.0, 1.0]], [[1 + 0 - 2 * 4, 1 + 1 - 2 * -3]]),
        ("a + c", "sum", [[1.0, 1.0]], [[1.0, 2.0]]),
    ],
)
def test_heads_by_rule(text, rule, base, expected):
    held = {} if base is None else {"score.weight": torch.tensor(base)}
    result = combine_heads(parse(text), HEADS, held, rule)
    torch.testing.assert_close(result["score.weight"].double(), torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("text", "rule", "message"),
    [
        ("a + c", "refuse", "adapter 'a': modules_to_save: it has whole trained layers (score.weight)"),
        ("a + b", "sum", "the base has no such layer, so heads can only be averaged"),
        ("0.5*a + 0.5*c", "sum", "the base has no such layer"),
        ("ties(a, b)", "sum", "heads have a sum, but no ties, dare or paper"),
    ],
)
def test_heads_that_are_refused(text, rule, message):
    with pytest.raises(AlgebraError) as refused:
        combine_heads(parse(text), HEADS, {}, rule)
    assert message in str(refused.value)
    assert combine_heads(parse("c"), HEADS, {}, rule) == {}


def test_a_call_is_no_sum():
    """Nothing here stands for itself on both sides: the atoms of a sum are the names and the three functions."""
    assert all(isinstance(parse(text), Call) for text in ("ties(a)", "dare(a, 0.5)", "paper(a)"))


def test_a_function_without_a_rule_is_an_error():
    """The parser knows no such function, so only a tree made by hand, or a parser that knows more, can have one."""
    with pytest.raises(AlgebraError, match=r"slerp\(a\): there is no rule for 'slerp'"):
        evaluate(Call("slerp", (Name("a"),)), ADAPTERS)
