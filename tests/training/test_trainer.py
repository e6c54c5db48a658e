import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from pipeline.config.dials import Adapter, Optim, Run
from pipeline.data.tokenize import IGNORE_INDEX, decode, language_rows
from pipeline.models.fresh_adapter import wrap_with_adapter
from pipeline.runtime.internals import tokens_trained
from pipeline.runtime.interrupts import Interrupts
from pipeline.training.batches import epoch_order
from pipeline.training.trainer import NextTokenTrainer, autocast_forward, count_tokens, run_training, training_arguments
from pipeline.training.validation import validation_loss

LENGTHS = (3, 9, 4, 12, 7, 2, 10, 5)
RUN = Run(precision="fp32", report_to="none")


@pytest.fixture
def rows(tokenizer):
    """Eight rows of unequal lengths, most with a prompt that has no label."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, len(tokenizer), (length,), generator=g).tolist() for length in LENGTHS]
    prompts = (1, 3, 0, 5, 2, 1, 1, 4)
    labels = [[IGNORE_INDEX] * prompt + row[prompt:] for prompt, row in zip(prompts, ids, strict=True)]
    return Dataset.from_list([{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)])


def token_losses(model, ids, labels, smoothing=0.0):
    """Cross-entropy of each labelled token of one row alone, float64; PyTorch spreads smoothing over all V tokens."""
    v = model.config.vocab_size
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    targets = torch.tensor(labels[1:])
    every = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing * v / (v - 1))
    return every[targets != IGNORE_INDEX]


def oracle(model, rows, smoothing=0.0):
    parts = [token_losses(model, row["input_ids"], row["labels"], smoothing) for row in rows]
    return torch.cat(parts).mean()


class Gradients(TrainerCallback):
    """Copies the gradients just before each optimiser step, and turns the step into nothing."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trainer_of(
    model,
    tokenizer,
    rows,
    folder,
    micro_batch=8,
    batch_size=8,
    smoothing=0.0,
    gradient_checkpointing=False,
    epochs=1.0,
    lengths=None,
    **arguments,
):
    optim = Optim(
        learning_rate=0.0, batch_size=batch_size, micro_batch=micro_batch, max_grad_norm=1e9, num_train_epochs=epochs,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    return NextTokenTrainer(
        label_smoothing=smoothing,
        lengths=lengths,
        model=model,
        args=SFTConfig(**training_arguments(RUN, optim, folder), **({"max_length": None} | arguments)),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def one_step(model, tokenizer, rows, folder, **arguments):
    """Loss and gradients of the one optimiser step in an epoch of eight rows."""
    trainer = trainer_of(model, tokenizer, rows, folder, **arguments)
    gradients = Gradients()
    trainer.add_callback(gradients)
    loss = trainer.train().training_loss
    assert len(gradients.steps) == 1
    return loss, gradients.steps[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_a_step_is_the_mean_over_all_its_tokens(micro_batch, smoothing, make_model, tokenizer, rows, tmp_path):
    model = make_model("llama")
    loss, gradients = one_step(model, tokenizer, rows, tmp_path, micro_batch=micro_batch, smoothing=smoothing)
    model.zero_grad()
    expected = oracle(model, rows, smoothing)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_the_last_batch_is_the_mean_over_the_tokens_of_its_rows(micro_batch, make_model, tokenizer, rows, tmp_path):
    """Eight rows in batches of three: the last has two. In the second epoch other rows meet."""
    model, gradients = make_model("llama"), Gradients()
    arguments = {"batch_size": 3, "micro_batch": micro_batch, "epochs": 2.0, "lengths": LENGTHS}
    trainer = trainer_of(model, tokenizer, rows, tmp_path, **arguments)
    trainer.add_callback(gradients)
    trainer.train()
    orders = [epoch_order(8, 3, RUN.seed, epoch, LENGTHS) for epoch in (0, 1)]
    batches = [[row for row in order[start : start + 3] if row < 8] for order in orders for start in (0, 3, 6)]
    assert sorted(map(len, batches)) == [2, 2, 3, 3, 3, 3]
    assert len(gradients.steps) == 6
    for batch, found in zip(batches, gradients.steps, strict=True):
        model.zero_grad()
        oracle(model, rows.select(batch)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-6, rtol=1e-4)
    assert tokens_trained(trainer) == 2 * sum(LENGTHS)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_loses_no_token(strategy, make_model, tokenizer, tmp_path):
    texts = ["the cat sat on the mat.", "a", "so he had tea on the sea, the cake", "no hat", "he ate", "on"]
    rows = language_rows(tokenizer, texts)
    trainer = trainer_of(
        make_model("llama"), tokenizer, rows, tmp_path, packing=True, packing_strategy=strategy, max_length=16
    )
    before = [token for ids in rows["input_ids"] for token in ids]
    after = [token for ids in trainer.train_dataset["input_ids"] for token in ids]
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 16
    assert count_tokens(trainer.train_dataset) == len(after) == len(before)
    assert Counter(after) == Counter(before)
    if strategy == "wrapped":
        assert after == before
        assert [len(ids) for ids in trainer.train_dataset["input_ids"]][:-1] == [16] * (len(before) // 16)


def test_wrapped_rows_train_on_every_token_but_the_first(make_model, tokenizer, tmp_path):
    rows = language_rows(tokenizer, ["the cat sat on the mat.", "a", "so he had tea on the sea, the cake"])
    model = make_model("llama")
    trainer = trainer_of(
        model, tokenizer, rows, tmp_path, packing=True, packing_strategy="wrapped", max_length=16, micro_batch=2
    )
    packed = [{"input_ids": ids, "labels": ids} for ids in trainer.train_dataset["input_ids"]]
    assert trainer.train().training_loss == pytest.approx(oracle(model, packed).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_texts_packed_side_by_side_do_not_see_each_other(kind, make_model, tokenizer, tmp_path):
    rows = language_rows(tokenizer, ["the cat sat", "a", "no hat", "he ate", "on", "so he had tea"])
    model = make_model(kind)
    packing = {"packing": True, "packing_strategy": "bfd_split", "max_length": 16}
    loss, _ = one_step(model, tokenizer, rows, tmp_path, **packing)
    alone = [{"input_ids": ids, "labels": ids} for ids in rows["input_ids"]]
    assert loss == pytest.approx(oracle(model, alone).item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_validation_loss_is_the_mean_over_all_tokens(batch_size, make_model, tokenizer, rows):
    model = make_model("gpt2", dropout=0.3).train()
    loss, tokens = validation_loss(model, tokenizer, rows, batch_size, "fp32")
    assert model.training
    assert loss == pytest.approx(oracle(model.eval(), rows).item(), abs=1e-5)
    assert tokens == sum(sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in rows)
    whole = rows.remove_columns("labels")
    loss, tokens = validation_loss(model, tokenizer, whole, batch_size, "fp32")
    labelled = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    assert loss == pytest.approx(oracle(model, labelled).item(), abs=1e-5)
    assert tokens == sum(LENGTHS) - len(LENGTHS)


def test_activations_computed_again_give_the_same_gradient(make_model, tokenizer, rows, tmp_path):
    """To the bit, with every layer run twice."""
    results = []
    for checkpointing in (False, True):
        model, forwards = make_model("llama"), []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        loss, gradients = one_step(model, tokenizer, rows, tmp_path, gradient_checkpointing=checkpointing)
        results.append((loss, gradients, len(forwards)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())
    assert (results[0][2], results[1][2]) == (1, 2)


class Log:
    """What a stage's log is told."""

    stage = "toy"
    heartbeat = SimpleNamespace(enter=lambda phase: None)
    config = SimpleNamespace(run=RUN)
    resume_from = None

    def __init__(self):
        self.rows = []
        self.checkpoints = []
        self.interrupts = Interrupts("toy")
        self.disk = []

    def check_disk(self, *needs):
        self.disk.append(needs)

    def save_checkpoint(self, step, write, state):
        self.checkpoints.append((step, state))

    def log(self, step, metrics):
        self.rows.append((step, metrics))

    def show_progress(self, total, done, **shown):
        self.shown = (total, done)


def test_the_log_has_the_loss_and_counts_real_tokens(make_model, tokenizer, rows, tmp_path):
    model, log = make_model("llama"), Log()
    trainer = trainer_of(model, tokenizer, rows, tmp_path, batch_size=4, micro_batch=2)
    assert run_training(trainer, model, log) is model
    step, metrics = log.rows[0]
    assert step == 1
    assert metrics.keys() >= {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}
    assert 0 < metrics["tokens"] < sum(LENGTHS)
    assert log.shown[0] == 2
    [(last, state)] = log.checkpoints  # at the end, should validation fail
    assert (last, state["tokens"]) == (2, sum(LENGTHS))
    size = 4 * sum(p.numel() for p in model.parameters())
    assert log.disk == [(3 * size, 1, size)]  # weights and Adam's two moments; one of them; final/


@pytest.mark.parametrize(("kind", "decays"), [("ia3", False), ("lora", True)])
def test_weight_decay_leaves_alone_what_is_one_where_it_does_nothing(
    kind, decays, make_model, tokenizer, rows, tmp_path
):
    model = wrap_with_adapter(make_model("llama"), Adapter(adapter=kind, lora_r=2))
    trainer = trainer_of(model, tokenizer, rows, tmp_path)
    adapter = {id(p) for p in model.parameters() if p.requires_grad}
    for group in trainer.create_optimizer().param_groups:
        if adapter & {id(p) for p in group["params"]}:
            assert (group["weight_decay"] > 0) == decays


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_models_forward_has_a_stages_precision_while_it_trains_and_gives_fp32(precision, make_model):
    model = make_model("llama")
    ids = torch.tensor([[1, 5, 7, 9]])
    before = model(ids).logits
    with autocast_forward(model, precision):
        inside = model(ids).logits
    assert inside.dtype == torch.float32
    assert torch.equal(inside, before) == (precision == "fp32")
    assert torch.equal(model(ids).logits, before)
    assert "forward" not in vars(model)


def test_a_loss_that_is_not_finite_stops_the_stage(make_model, tokenizer, rows, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    trainer = trainer_of(model, tokenizer, rows, tmp_path, batch_size=4, micro_batch=2)
    with pytest.raises(FloatingPointError, match="toy: loss is nan at step 1"):
        run_training(trainer, model, Log())


def test_decoding_leaves_out_special_tokens_and_keeps_spaces(tokenizer):
    ids = tokenizer("the cat , no .")["input_ids"]
    assert decode(tokenizer, [tokenizer.pad_token_id, *ids, tokenizer.eos_token_id]) == "the cat , no ."
