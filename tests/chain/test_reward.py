import dataclasses

import pytest
import torch
from transformers import TrainerCallback

from pipeline.config.dials import Optim, Run
from pipeline.config.stages import Reward
from pipeline.data.tokenize import preference_rows
from pipeline.reward import new_trainer, pair_lengths
from pipeline.rl.rewards import reward_model_scores
from pipeline.training.batches import epoch_order

PAIRS = [
    {"prompt": "", "chosen": "the cat sat", "rejected": "a dog", "margin": 2.0},
    {"prompt": "", "chosen": "no", "rejected": "the sea. the hat", "margin": 0.5},
    {"prompt": "he had", "chosen": " tea", "rejected": " cake, the dog ate", "margin": 0.0},
    {"prompt": "", "chosen": "on a mat.", "rejected": "so", "margin": 0.0},
]
CONFIG = Reward(
    run=Run(precision="fp32", report_to="none"),
    optim=Optim(learning_rate=1e-3, weight_decay=0.0, warmup_steps=0.0, max_grad_norm=1e9, batch_size=4, micro_batch=4),
    head_learning_rate=1e-2,
)


class Watch(TrainerCallback):
    def __init__(self):
        self.gradients, self.rates = {}, []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        self.rates = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


def bradley_terry(model, rows):
    """-log sigmoid(chosen - rejected - margin) of each pair, every text scored alone."""

    def score(ids):
        return reward_model_scores.__wrapped__(model, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))

    gaps = [score(row["chosen_ids"]) - score(row["rejected_ids"]) - row["margin"] for row in rows]
    return -torch.nn.functional.logsigmoid(torch.cat(gaps))


def test_a_step_is_the_bradley_terry_loss_of_our_scores_with_margins(reward_model, tokenizer, tmp_path):
    reward_model.requires_grad_(True)
    rows, _ = preference_rows(tokenizer, PAIRS, 99, "error")
    expected = bradley_terry(reward_model, rows).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in reward_model.named_parameters()}
    reward_model.zero_grad()
    trainer, watch = new_trainer(reward_model, tokenizer, rows, CONFIG, tmp_path), Watch()
    trainer.add_callback(watch)
    assert trainer.train().training_loss == pytest.approx(expected.item(), abs=1e-5)
    assert set(watch.gradients) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(watch.gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2


@pytest.mark.parametrize("micro_batch", [3, 1])
def test_the_last_batch_is_the_mean_over_its_pairs(micro_batch, reward_model, tokenizer, tmp_path):
    """Four pairs in batches of three: one is left, and its step is its own loss, in full."""
    reward_model.requires_grad_(True)
    rows, _ = preference_rows(tokenizer, PAIRS, 99, "error")
    optim = dataclasses.replace(CONFIG.optim, learning_rate=0.0, batch_size=3, micro_batch=micro_batch)
    config = dataclasses.replace(CONFIG, optim=optim, head_learning_rate=0.0)
    trainer, watch = new_trainer(reward_model, tokenizer, rows, config, tmp_path), Watch()
    trainer.add_callback(watch)
    order = epoch_order(4, 3, CONFIG.run.seed, 0, pair_lengths(rows))
    batches = [[row for row in order[start : start + 3] if row < 4] for start in (0, 3)]
    assert sorted(map(len, batches)) == [1, 3]
    loss = trainer.train().training_loss
    means = [bradley_terry(reward_model, rows.select(batch)).mean() for batch in batches]
    assert loss == pytest.approx(sum(means).item() / 2, abs=1e-5)
    reward_model.zero_grad()
    means[1].backward()
    for name, parameter in reward_model.named_parameters():
        torch.testing.assert_close(watch.gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_head_learns_at_its_own_rate_and_norms_do_not_decay(reward_model, tokenizer, tmp_path):
    rows, _ = preference_rows(tokenizer, PAIRS, 99, "error")
    optim = Optim(learning_rate=1e-3, weight_decay=0.1, warmup_steps=0.0, batch_size=4, micro_batch=4)
    config = Reward(run=CONFIG.run, optim=optim, head_learning_rate=1e-2)
    reward_model.requires_grad_(True)
    names = {id(p): name for name, p in reward_model.named_parameters()}
    trainer, watch = new_trainer(reward_model, tokenizer, rows, config, tmp_path), Watch()
    trainer.add_callback(watch)
    trainer.train()
    groups = [[names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups]
    assert [rate for _, rate, _ in watch.rates] == pytest.approx([1e-3, 1e-3, 1e-2])
    assert [decay for _, _, decay in watch.rates] == [0.1, 0.0, 0.1]
    assert groups[2] == ["score.weight"]
    assert all("ln" in name or "bias" in name for name in groups[1])
    assert not any("ln" in name or "bias" in name for name in groups[0])
    assert sorted(name for group in groups for name in group) == sorted(names.values())
