import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny import configs
from transformers import TrainerCallback

from pipeline import reward
from pipeline.config.dials import Optim, Run, Sampling
from pipeline.config.stages import Reward
from pipeline.data.files import DataError
from pipeline.data.prompts import read_prompts
from pipeline.data.tokenize import preference_rows
from pipeline.data.tokenizer import ModelError, load_tokenizer
from pipeline.models.heads import load_reward_model
from pipeline.models.loading import context_length
from pipeline.models.saving import save_policy
from pipeline.reward import (
    MARGIN_EDGES,
    describe_accuracy,
    held_out_figures,
    mean_score,
    new_trainer,
    pair_lengths,
    read_held_out,
    sample_responses,
    write_score_shift,
)
from pipeline.rl.rewards import reward_model_scores
from pipeline.runtime.finished import read_done
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


def test_the_scale_is_centred_on_whole_and_cut_off_samples_alike(
    policy, reward_model, tokenizer, tmp_path, monkeypatch
):
    """Seven prompts in batches of two; some of the responses end, some are cut, and these score otherwise.

    `micro_batch` has no part in what is drawn.
    """
    monkeypatch.setattr(reward, "SAMPLED", 2)
    save_policy(policy, tokenizer, tmp_path)
    sampling = Sampling(max_new_tokens=9, max_prompt_tokens=12, temperature=0.7)
    config = dataclasses.replace(CONFIG, sampling=sampling)
    prompts = ["the cat", " a", "so he had tea", "", " no hat", "the sea on", "a dog ate"]
    samples = sample_responses(reward_model, tokenizer, prompts, dict.fromkeys(("base", "sft"), tmp_path), config)
    texts = [row[real] for ids, mask in samples for row, real in zip(ids, mask, strict=True)]
    assert len(texts) == len(prompts)
    other = dataclasses.replace(config, optim=dataclasses.replace(CONFIG.optim, micro_batch=1))
    again = sample_responses(reward_model, tokenizer, prompts, dict.fromkeys(("base", "sft"), tmp_path), other)
    assert all(torch.equal(ids, others) for (ids, _), (others, _) in zip(samples, again, strict=True))
    scores = torch.cat(
        [reward_model_scores(reward_model, text[None], torch.ones_like(text[None]).bool()) for text in texts]
    )
    ended = torch.tensor([bool(text[-1] == tokenizer.eos_token_id) for text in texts])
    assert 1 <= ended.sum() <= 6
    assert mean_score(reward_model, samples) == pytest.approx(scores.mean().item(), abs=1e-5)
    for others in (scores[ended], scores[~ended], scores[:6]):
        assert abs(others.mean() - scores.mean()) > 0.02


WORDS = ("cat", "dog", "hat", "sea")


def write(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def held_out_of(tmp_path, rows, reward_model, tokenizer, pairs=None, **dials):
    """The held-out figures of rows, and what they are of."""
    rows = [{field: value for field, value in row.items() if value != ""} for row in rows]
    file, config = write(tmp_path / "held.jsonl", rows), dataclasses.replace(CONFIG, **dials)
    held_out = read_held_out(file, tokenizer, config, {}, context_length(reward_model))
    return held_out_figures(reward_model, tokenizer, held_out, config, pairs), held_out


def test_held_out_pairs_beyond_the_context_are_left_out_and_counted(reward_model, tokenizer, tmp_path, capsys):
    """GPT-2 has no position after its 64: a longer text would end the stage, after it was trained."""
    long = {"prompt": "", "chosen": "the cat sat. " * 6, "rejected": "a dog", "margin": 1.0}
    report, held_out = held_out_of(tmp_path, [PAIRS[0], long, *PAIRS[1:]], reward_model, tokenizer, too_long="cut")
    assert [row["chosen"] for row in held_out.rows] == [row["chosen"] for row in PAIRS]
    assert held_out.tokens.to_list() == preference_rows(tokenizer, PAIRS, 99, "error")[0].to_list()
    assert (report["pairs_too_long"], report["accuracy"]["n"]) == (1, 4)
    printed = " ".join(capsys.readouterr().out.split())
    assert "held.jsonl: 1 of 5 pairs are longer than the model's context of 64 tokens (up to 80): left out" in printed


@pytest.mark.parametrize(("treatment", "kept"), [("error", 1), ("drop", 0)])
def test_held_out_pairs_beyond_the_context_are_refused_before_anything_is_trained(treatment, kept, folder, tmp_path):
    pairs = [{"chosen": f"the {word} sat", "rejected": f"no {word}"} for word in WORDS]
    long = {"chosen": "the cat saw the dog and the hat. " * 2, "rejected": "no"}
    config = configs(folder, tmp_path / "runs", "tiny")["reward"]
    config = dataclasses.replace(
        config, test_file=write(tmp_path / "test.jsonl", [*pairs[:kept], long]), too_long=treatment
    )
    with pytest.raises(DataError, match=r"test\.jsonl: 1 of . pairs are longer than the model's context of 48 tokens"):
        reward.train(config)
    assert not (tmp_path / "runs/tiny/reward/metrics.jsonl").exists()


def test_sampled_texts_beyond_the_context_are_refused_before_anything_is_trained(folder, tmp_path):
    config = configs(folder, tmp_path / "runs", "tiny")["reward"]
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, max_new_tokens=60))
    with pytest.raises(
        ModelError, match=r"its context is 48 tokens, sampled texts may have 76; lower max_prompt_tokens"
    ):
        reward.train(config)
    assert not (tmp_path / "runs/tiny/reward/metrics.jsonl").exists()


def test_negative_margins_have_a_bucket_of_their_own(reward_model, tokenizer, tmp_path):
    rows = [row | {"margin": margin} for row, margin in zip(PAIRS, (-1.0, 0.0, 0.5, -0.25), strict=True)]
    report, _ = held_out_of(tmp_path, rows, reward_model, tokenizer)
    sizes = [(bucket["low"], bucket["accuracy"] and bucket["accuracy"]["n"]) for bucket in report["by_margin"]]
    assert sizes == [(-math.inf, 2), (0.0, 1), (0.5, 1), (1.0, None), (2.0, None), (3.0, None)]
    report, _ = held_out_of(tmp_path, PAIRS, reward_model, tokenizer)
    assert [bucket["low"] for bucket in report["by_margin"]] == list(MARGIN_EDGES[:-1])


def test_a_word_baseline_of_a_language_without_spaces_is_measured(reward_model, tokenizer, tmp_path):
    pairs = [
        {"prompt": "请问", "chosen": f"当然是{x}很好", "rejected": f"不知道{x}吧", "margin": 0.0} for x in "山水火土"
    ]
    report, _ = held_out_of(tmp_path, pairs, reward_model, tokenizer, pairs=pairs)
    assert report["linear_baseline"]["value"] == 1.0
    assert report["longer_wins"]["value"] == 1.0  # characters count as words


def test_a_side_figure_that_cannot_be_computed_is_not_measured(reward_model, tokenizer, tmp_path, capsys):
    """Two texts alone: no word is in three of them, and all have one length."""
    pairs = [{"prompt": "", "chosen": "cat", "rejected": "dog", "margin": 0.0}]
    report, _ = held_out_of(tmp_path, pairs * 3, reward_model, tokenizer, pairs=pairs * 3)
    assert report["accuracy"]["value"] in (0.0, 1.0)
    assert report["linear_baseline"] is None
    assert report["score_length_correlation"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "linear_baseline on" in printed
    assert "not measured: no word is in 3 of the 2 texts" in printed
    assert "TF-IDF + ridge not measured; longer wins 0.500" in describe_accuracy(report)


def test_sources_of_any_kind_and_none_are_told_apart(reward_model, tokenizer, tmp_path):
    rows = [row | {"source": source} for row, source in zip(PAIRS, ("a", 7, None, "a"), strict=True)]
    report, _ = held_out_of(tmp_path, rows, reward_model, tokenizer)
    assert {source: found["n"] for source, found in report["by_source"].items()} == {"7": 1, "a": 2}


def test_weights_are_written_before_anything_is_measured(folder, tmp_path, monkeypatch, capsys):
    runs, config = tmp_path / "runs", configs(folder, tmp_path / "runs", "tiny")["reward"]
    written = []

    def fails(*_):
        written.append(load_reward_model(runs / "tiny/reward/final.partial"))
        raise MemoryError

    monkeypatch.setattr(reward, "held_out_figures", fails)
    final = reward.train(config)
    metrics, saved = read_done(final)["metrics"], (final / "config.json").read_text()
    assert len(written) == 2
    assert (metrics["validation"], metrics["test"]) == (None, None)
    assert "reward: test: not measured: MemoryError" in capsys.readouterr().out
    # Centred on SFT's samples, which were drawn before training, and saved so, in the form of transformers.
    model, tokenizer = load_reward_model(final), load_tokenizer(final)
    assert model.config.score_shift == metrics["score_shift"] != 0
    prompts = read_prompts(config.prompts_file, config.centre_prompts, tokenizer, config)
    parents = {"sft": Path(config.sft), "base": Path(config.base)}
    assert mean_score(model, sample_responses(model, tokenizer, prompts, parents, config)) == pytest.approx(0, abs=1e-5)
    model.config.save_pretrained(tmp_path)
    write_score_shift(tmp_path, metrics["score_shift"])
    assert (tmp_path / "config.json").read_text() == saved


def test_an_interruption_of_the_measurements_leaves_the_weights(folder, tmp_path, monkeypatch, capsys):
    config = configs(folder, tmp_path / "runs", "tiny")["reward"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "held_out_figures", stop)
    with pytest.raises(KeyboardInterrupt):
        reward.train(config)
    partial = tmp_path / "runs/tiny/reward/final.partial"
    assert load_reward_model(partial).config.score_shift != 0
    assert f"the weights are whole in {partial}" in "".join(capsys.readouterr().out.split("\n"))
