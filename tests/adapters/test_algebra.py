"""The algebra against dense matrices in float64: what a sum of updates is, by whole dW and never by factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expressions import by_definition, constants, trees

from pipeline.adapters import algebra
from pipeline.adapters.algebra import (
    AlgebraError,
    Factors,
    Scales,
    add,
    compress,
    compressed,
    dense,
    evaluate,
    factors,
    from_dense,
)
from pipeline.adapters.expressions import Call, parse

SHAPES = {"q": (6, 5), "k": (5, 5), "down": (4, 9)}


def lora(seed: int, ranks: dict[str, int], scale: float = 1.7, bias: bool = False) -> algebra.Update:
    """A random update with its ranks by module, away from unit scale."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for module, rank in ranks.items():
        out, into = SHAPES[module]
        b, a = (torch.randn(*shape, generator=g) for shape in ((out, rank), (rank, into)))
        made[module] = factors(b, a, scale, torch.randn(out, generator=g) if bias else None)
    return made


def ia3(seed: int, modules: str = "q k down") -> algebra.Update:
    g = torch.Generator().manual_seed(seed)
    return {m: Scales(1 + torch.randn(SHAPES[m][1], generator=g).double(), m == "down") for m in modules.split()}


def changes(update: algebra.Update) -> dict[str, torch.Tensor]:
    """What it changes, dense; a module it leaves alone is not there."""
    found = {m: dense(part) if isinstance(part, Factors) else part.l - 1 for m, part in update.items()}
    return {m: change for m, change in found.items() if change.abs().max() > 1e-9}


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for module in expected:
        torch.testing.assert_close(actual[module], expected[module], atol=tolerance, rtol=tolerance)


def oracle(tree, adapters):
    """The expression worked out on dense changes, leaf by leaf."""
    leaves = by_definition(tree)
    total = {}
    for name in dict.fromkeys(name for name, _ in leaves):
        total = plus(total, adapters[name], float(sum(weight for leaf, weight in leaves if leaf == name)))
    return total


def plus(x, y, weight):
    return {m: x.get(m, 0) + weight * y.get(m, 0) for m in x.keys() | y.keys()}


ADAPTERS = {
    "a": lora(1, {"q": 2, "k": 1}),
    "b": lora(2, {"q": 3, "down": 2}, scale=0.4),
    "sft": lora(3, {"q": 1, "k": 2, "down": 4}),
    "yelp_lm": lora(4, {"k": 5}),
    "x.v2": lora(5, {"down": 1}, scale=-2.0),
}
SCALES = {"a": ia3(1), "b": ia3(2, "q"), "sft": ia3(3, "k down"), "yelp_lm": ia3(4), "x.v2": ia3(5, "down")}


@settings(deadline=None)
@given(trees(constants, functions=False), st.sampled_from((ADAPTERS, SCALES)))
def test_an_expression_is_the_same_sum_of_dense_changes(tree, adapters):
    expected = oracle(tree, {name: changes(update) for name, update in adapters.items()})
    size = 1 + max((float(change.abs().max()) for change in expected.values()), default=0)
    found = {m: dense(p) if isinstance(p, Factors) else p.l - 1 for m, p in evaluate(tree, adapters).items()}
    for module, change in expected.items():
        torch.testing.assert_close(found[module] / size, change / size, atol=1e-10, rtol=0)
    for module in found.keys() - expected.keys():
        assert not found[module].any()


sizes = st.floats(0.01, 2) | st.floats(-2, -0.01)
ranks = st.dictionaries(st.sampled_from(sorted(SHAPES)), st.integers(1, 5), min_size=1)


@settings(deadline=None, max_examples=40)
@given(ranks, ranks, st.integers(0, 10**6), sizes, sizes)
def test_the_laws_on_updates(ranks_a, ranks_b, seed, scale, weight):
    a, b = lora(seed, ranks_a, scale), lora(seed + 1, ranks_b)
    whole_a, whole_b = changes(a), changes(b)

    def total(*terms):
        return compress(add([(f"t{i}", w, update) for i, (w, update) in enumerate(terms)]))[0]

    assert_same(changes(total((1, a))), whole_a)
    assert_same(changes(total((0.5, a), (0.5, a))), whole_a)
    assert_same(changes(total((1, a), (1, b))), changes(total((1, b), (1, a))))
    assert_same(changes(total((1, total((1, a), (1, b))), (-1, b))), whole_a)
    assert_same(changes(total((-1, total((-1, a))))), whole_a)
    assert changes(total((1, a), (-1, a))) == {}
    both = plus(whole_a, whole_b, weight)
    kept = {module: change for module, change in both.items() if change.abs().max() > 1e-9}
    assert_same(changes(total((1, a), (weight, b))), kept)
    for module, part in total((0.5, a), (0.5, a)).items():  # the sum needs no more ranks than its like
        assert part.rank == min(ranks_a[module], *SHAPES[module])
    for part in total((1, a), (-1, a)).values():
        assert part.rank == 1
        assert not part.b.any()
        assert not part.a.any()


def test_weights_that_cancel_leave_the_modules():
    found = evaluate(parse("a - a"), ADAPTERS)
    assert found.keys() == ADAPTERS["a"].keys()
    assert all(part.rank == 1 and not dense(part).any() for part in found.values())
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
        found = evaluate(parse("sft"), adapters)
        assert found.keys() == adapters["sft"].keys()
        for module, part in found.items():
            own = adapters["sft"][module]
            assert torch.equal(part.l, own.l) if isinstance(part, Scales) else torch.equal(dense(part), dense(own))


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


# compression


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_what_a_rank_discards_is_the_tail_of_the_spectrum(rank):
    part = add([("a", 1.0, lora(7, {"q": 3})), ("b", -0.7, lora(8, {"q": 3}))])["q"]
    kept, discarded = compressed(part, rank)
    spectrum = torch.linalg.svdvals(dense(part))
    tail = (spectrum[rank:].square().sum() / spectrum.square().sum()).item()
    assert discarded == pytest.approx(tail, rel=1e-9, abs=1e-15)
    error = ((dense(kept) - dense(part)).norm() / dense(part).norm()).item()
    assert error == pytest.approx(tail**0.5, rel=1e-6, abs=1e-12)
    assert kept.rank == min(rank, 5)


def test_an_update_that_needs_its_ranks_keeps_its_factors():
    part = ADAPTERS["b"]["q"]
    assert compressed(part) == (part, 0.0)
    assert compressed(part, 3)[0] is part


def test_ranks_that_only_hold_rounding_go():
    a = lora(9, {"q": 3})["q"]
    noise = Factors(1e-11 * a.b.roll(1, 0), a.a.roll(1, 1), 1e-11 * a.size)
    assert compressed(add([("a", 1.0, {"q": a}), ("noise", 1.0, {"q": noise})])["q"])[0].rank == 3
    small = Factors(1e-6 * a.b[:, :1].roll(1, 0), a.a[:1].roll(1, 1), 1e-6 * a.size)
    assert compressed(add([("a", 1.0, {"q": a}), ("small", 1.0, {"q": small})])["q"])[0].rank == 4


def test_a_dense_update_and_its_factors():
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    assert from_dense(matrix).rank == 4
    torch.testing.assert_close(dense(from_dense(matrix)), matrix, atol=1e-13, rtol=0)
    assert from_dense(torch.zeros(3, 2)).rank == 1


def test_norms_and_angles_are_those_of_the_dense_updates():
    x, y = ADAPTERS["sft"], ADAPTERS["b"]
    flat = {name: torch.cat([changes(u).get(m, torch.zeros(SHAPES[m])).flatten() for m in SHAPES]) for name, u in
            (("x", x), ("y", y))}  # fmt: skip
    assert algebra.norm(x["q"]) == pytest.approx(dense(x["q"]).norm().item(), rel=1e-12)
    assert algebra.length(x) == pytest.approx(flat["x"].norm().item(), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(flat["x"], flat["y"], 0).item()
    assert algebra.cosine(x, y) == pytest.approx(cosine, rel=1e-12)
    assert algebra.cosine(x, x) == pytest.approx(1)
    assert algebra.distance(x, y) == pytest.approx(((flat["x"] - flat["y"]).norm() / flat["y"].norm()).item())
    scales = torch.nn.functional.cosine_similarity(SCALES["a"]["q"].l - 1, SCALES["b"]["q"].l - 1, 0).item()
    assert algebra.cosine({"q": SCALES["a"]["q"]}, SCALES["b"]) == pytest.approx(scales)


# beyond sums


def test_ties_by_hand():
    x, y = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.5, -2.0, 0.5])
    assert algebra.ties([x, -y], 1.0).tolist() == [1.0, 1.5, -0.75]  # the sign is elected after the weight -1
    assert algebra.ties([x, y], 1.0).tolist() == [0.75, -2.0, -1.0]
    assert algebra.ties([torch.tensor([1.0, -4.0, 2.0, 3.0])], 0.5).tolist() == [0.0, -4.0, 0.0, 3.0]
    assert algebra.ties([torch.tensor([1.0]), torch.tensor([-1.0])], 1.0).tolist() == [0.0]


def test_ties_and_dare_act_on_whole_updates():
    tied = evaluate(parse("ties(a, -2*b, density=0.5)"), ADAPTERS)
    for module, part in tied.items():
        whole = [
            changes({m: p for m, p in u.items() if m == module}).get(module) for u in (ADAPTERS["a"], ADAPTERS["b"])
        ]
        parts = [w * x for w, x in zip((1, -2), whole, strict=True) if x is not None]
        torch.testing.assert_close(dense(part), algebra.ties(parts, 0.5), atol=1e-12, rtol=0)
    dropped = evaluate(parse("dare(a, 0.75, seed=3)"), ADAPTERS)
    for module, part in dropped.items():
        whole = dense(ADAPTERS["a"][module])
        ratio = dense(part) / whole
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


def test_dare_is_drawn_from_its_seed_alone():
    ones = torch.ones(200, 100).double()
    torch.manual_seed(1)
    first = algebra.dare(ones, 0.9, 5, "q")
    torch.manual_seed(2)
    torch.rand(3)
    assert torch.equal(first, algebra.dare(ones, 0.9, 5, "q"))
    assert not torch.equal(first, algebra.dare(ones, 0.9, 6, "q"))
    assert not torch.equal(first, algebra.dare(ones, 0.9, 5, "k"))
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 10.0]).double())
    assert first.mean().item() == pytest.approx(1, abs=0.1)  # standard error 0.02
    assert torch.equal(algebra.dare(ones, 0.0, 5, "q"), ones)


# the paper's rules, with the numbers of its authors' formulas written out: rank 1, A = (1, 2) and (3, -1), B = 5 and 7


A1, A2, A3 = (torch.tensor([row]) for row in ([1.0, 2.0], [3.0, -1.0], [-2.0, 4.0]))
B1, B2, B3 = (torch.tensor([[x]]) for x in (5.0, 7.0, 11.0))
PAPER = {name: {"q": factors(b, a)} for name, b, a in (("x", B1, A1), ("y", B2, A2), ("z", B3, A3))}


@pytest.mark.parametrize(
    ("text", "b", "a"),
    [
        ("paper(x + y)", 6.0, [2.0, 0.5]),  # weights always sum to 1
        ("paper(3*x + y)", 5.5, [1.5, 1.25]),
        ("paper(avg(x, y))", 6.0, [2.0, 0.5]),
        ("paper(lerp(x, y, 0.25))", 5.5, [1.5, 1.25]),
        ("paper(-x)", -5.0, [1.0, 2.0]),
        ("paper(-x, neg=A)", 5.0, [-1.0, -2.0]),
        ("paper(-0.4*x, neg=A)", 5.0, [-0.4, -0.8]),  # unlearning: A <- -λ A, B unchanged
        # analogy: A = c0 A_aux + c1 A_aim + c1 A_auxlm, B = c0 B_aux + c1 B_aim - c1 B_auxlm
        ("paper(0.6*x + 0.4*(y - z))", 0.6 * 5 + 0.4 * 7 - 0.4 * 11, [0.6 + 1.2 - 0.8, 1.2 - 0.4 + 1.6]),
        # detox: A = A1 + λ(A1 - A2), B = B1 + λ(B1 + B2)
        (
            "paper(x - 0.4*(y - x), neg=A, normalise=no)",
            5 + 0.4 * (5 + 7),
            [1 + 0.4 * (1 - 3), 2 + 0.4 * (2 + 1)],
        ),
        ("paper(x + y, normalise=no)", 12.0, [4.0, 1.0]),
    ],
)
def test_the_papers_rules_by_hand(text, b, a):
    part = evaluate(parse(text), PAPER)["q"]
    torch.testing.assert_close(dense(part), b * torch.tensor([a], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_papers_rules_for_ia3_by_hand():
    x, y, z = (torch.tensor(row).double() for row in ([2.0, 0.5], [1.0, 3.0], [0.0, 1.5]))
    adapters = {name: {"q": Scales(vector, False)} for name, vector in (("x", x), ("y", y), ("z", z))}

    def vector(text):
        return evaluate(parse(text), adapters)["q"].l

    torch.testing.assert_close(vector("paper(x + y)"), (x + y) / 2)
    torch.testing.assert_close(vector("paper(-x)"), 2 - x)
    torch.testing.assert_close(vector("paper(-0.7*x)"), 1.7 - 0.7 * x)
    torch.testing.assert_close(vector("paper(0.6*x + 0.4*(y - z))"), 1 + 0.6 * (x - 1) + 0.4 * (y - z))


def test_the_papers_sum_is_not_the_sum():
    """Its cross terms B1 A2 and B2 A1 are there, which is why it is for reproduction only."""
    found, exact = (dense(evaluate(parse(text), PAPER)["q"]) for text in ("paper(x + y)", "0.5*x + 0.5*y"))
    torch.testing.assert_close(found, exact + (B1 @ A2 + B2 @ A1 - B1 @ A1 - B2 @ A2).double() / 4)


# refusals and rules


@pytest.mark.parametrize(
    ("text", "adapters", "message"),
    [
        ("a + i", {"a": ADAPTERS["a"], "i": SCALES["a"]}, "adapter 'i' is IA3, 'a' is LoRA"),
        ("ties(a, i)", {"a": ADAPTERS["a"], "i": SCALES["a"]}, "adapter 'i' is IA3, 'a' is LoRA"),
        (
            "a + w",
            {"a": ADAPTERS["a"], "w": {"q": factors(torch.ones(6, 1), torch.ones(1, 4))}},
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


def test_biases_are_added_where_all_have_one():
    x, y = lora(1, {"q": 2}, scale=3.0, bias=True), lora(2, {"q": 1, "k": 1}, bias=True)
    found = evaluate(parse("2*x - y"), {"x": x, "y": y})
    torch.testing.assert_close(found["q"].bias, 2 * x["q"].bias - y["q"].bias)
    torch.testing.assert_close(found["k"].bias, -y["k"].bias)
    g = torch.Generator().manual_seed(1)
    torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
    torch.testing.assert_close(x["q"].bias, 3.0 * torch.randn(6, generator=g).double())  # PEFT scales the bias too


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
    found = algebra.combined_heads(parse(text), HEADS, held, rule)
    torch.testing.assert_close(found["score.weight"].double(), torch.tensor(expected).double())


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
        algebra.combined_heads(parse(text), HEADS, {}, rule)
    assert message in str(refused.value)
    assert algebra.combined_heads(parse("c"), HEADS, {}, rule) == {}


def test_a_call_is_no_sum():
    """Nothing here stands for itself on both sides: the atoms of a sum are the names and the three functions."""
    assert all(isinstance(parse(text), Call) for text in ("ties(a)", "dare(a, 0.5)", "paper(a)"))
