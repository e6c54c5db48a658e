"""What is said of a name that is no dial: what it is called now, or, if it is another library's, here.

An entry `stage.name` goes before `name`. An answer is one dial, or a sentence that names dials in quotes; it is given
only in a stage that has such a dial.
"""

import difflib
import re
from collections.abc import Collection

RENAMED = {
    "adam_eps": "adam_epsilon",
    "adapter_targets": "target_modules",
    "checkpoint_every": "save_steps",
    "clip": "cliprange",
    "dora": "use_dora",
    "epochs": "num_train_epochs",
    "ppo.epochs": "num_ppo_epochs",
    "eval_every": "eval_steps",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "lora_rank": "lora_r",
    "max_tokens": "max_length",
    "minibatches": "num_mini_batches",
    "packing": "packing_strategy",
    "rslora": "use_rslora",
    "steps": "max_steps",
    "value_clip": "cliprange_value",
    "value_coef": "vf_coef",
    "warmup": "warmup_steps",
}

ELSEWHERE = {  # names of TRL, transformers and LLaMA-Factory: docs/from-trl.md; …_key are OpenRLHF's
    "adap_kl_ctrl": "say 'adaptive_kl', the nats per response to steer to; none: kl_coef is fixed",
    "ppo.batch_size": "rollout_batch",
    "beta": "kl_coef",
    "bf16": "say 'precision' auto, fp32, bf16 or fp16",
    "pretrain.block_size": "context",
    "center_rewards_coefficient": "the score is centred after training, on samples for 'centre_prompts'",
    "chat_template_path": "chat_template",
    "chosen_key": "say 'columns' chosen=<its name>",
    "column_mapping": "say 'columns', ours=theirs",
    "cutoff_len": "max_length",
    "ppo.cutoff_len": "max_prompt_tokens",
    "pretrain.cutoff_len": "context",
    "dataset_name": "train_file",
    "dataset_streaming": "stream",
    "dataset_text_field": "say 'columns' text=<its name>",
    "do_sample": "responses are always sampled; 'temperature' is all there is to set",
    "dtype": "precision",
    "epsilon": "cliprange",
    "eval_steps": "only PPO evaluates on the way; here 'validation_file' is measured at the end",
    "finetuning_type": "say 'adapter' none, lora or ia3",
    "fp16": "say 'precision' auto, fp32, bf16 or fp16",
    "gradient_accumulation_steps": "say 'batch_size', the rows per optimiser step over all processes",
    "ppo.gradient_accumulation_steps": "say 'rollout_batch' and 'num_mini_batches': it follows from them",
    "horizon": "adaptive_kl_horizon",
    "init_kl_coef": "kl_coef",
    "input_key": "say 'columns' prompt=<its name>, or question=<its name> for the user's turn of a conversation",
    "kl_estimator": "'kl_coef' charges k1, the estimate whose gradient in the reward is the KL's",
    "label_smoothing_factor": "say 'label_smoothing', (K-1)/K of it: spread over the K-1 wrong classes, not over all K",
    "load_best_model_at_end": "say 'keep' best or last",
    "local_rollout_forward_batch_size": "micro_batch",
    "lora_dropout": "no 'adapter' has dropout: a log-probability must be the same number whenever it is computed",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "'learning_rate' rises over 'warmup_steps', then falls along a cosine to zero",
    "ppo.lr_scheduler_type": "'learning_rate' falls linearly to zero",
    "max_completion_length": "max_new_tokens",
    "pretrain.max_length": "context",
    "max_prompt_length": "max_prompt_tokens",
    "max_samples": "train_rows",
    "max_seq_length": "max_length",
    "pretrain.max_seq_length": "context",
    "max_steps": "say 'num_train_epochs'; only pretraining can count its steps",
    "ppo.max_steps": "rollouts",
    "mini_batch_size": "say 'num_mini_batches', the optimiser steps per pass over a rollout",
    "missing_eos_penalty": "say 'missing_eos_score', which replaces the score; TRL's is subtracted from it",
    "model_name_or_path": "base",
    "ppo.model_name_or_path": "sft",
    "pretrain.model_name_or_path": "init",
    "num_epochs": "num_train_epochs",
    "num_sample_generations": "say 'eval_steps', the rollouts between two evaluations",
    "num_total_batches": "rollouts",
    "ppo.num_train_epochs": "say 'rollouts' for all of training, 'num_ppo_epochs' for the passes over each rollout",
    "output_key": "say 'columns' completion=<its name>, or response=<its name> for the answer in a conversation",
    "output_dir": "say 'runs' and 'recipe': a stage writes into <runs>/<recipe>/<stage>",
    "per_device_eval_batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "ppo_buffer_size": "num_mini_batches",
    "ppo_epochs": "num_ppo_epochs",
    "ppo_score_norm": "scores are centred once, after reward training; 'score_clip' bounds them",
    "ppo_target": "adaptive_kl",
    "ppo_whiten_rewards": "advantages are whitened, rewards are not; 'score_clip' bounds a score",
    "prompt_key": "say 'columns' prompt=<its name>, or question=<its name> for the user's turn of a conversation",
    "quantization_bit": "load_in_4bit",
    "ref_model": "the reference is the policy that 'sft' names",
    "response_length": "max_new_tokens",
    "resume_from_checkpoint": "a stage that was cut off goes on by itself; see 'save_steps'",
    "rejected_key": "say 'columns' rejected=<its name>",
    "reward_model": "reward",
    "reward_model_path": "reward",
    "run_name": "recipe",
    "sft_model_path": "sft",
    "stop_token": "a response ends with the tokenizer's EOS, or after 'max_new_tokens'",
    "stop_token_id": "a response ends with the tokenizer's EOS, or after 'max_new_tokens'",
    "streaming": "stream",
    "target": "adaptive_kl",
    "template": "say 'chat_template', a jinja file; empty: the tokenizer's own",
    "top_k": "'temperature' is all there is to set: what is sampled must be exactly what is scored",
    "top_p": "'temperature' is all there is to set: what is sampled must be exactly what is scored",
    "torch_dtype": "precision",
    "total_episodes": "say 'rollouts': their number times rollout_batch is the episodes",
    "use_peft": "say 'adapter' lora or ia3",
    "value_model": "say 'critic' reward, sft or head",
    "warmup_ratio": "say 'warmup_steps': below 1 it is a share of all steps",
    "ppo.warmup_steps": "PPO has none; in the first 'critic_warmup' rollouts the critic alone learns",
    "whiten_rewards": "advantages are whitened, rewards are not; 'score_clip' bounds a score",
}


def unknown(name: str, known: Collection[str], stage: str) -> str:
    """What to say of a name that is none of a stage's dials."""

    def answer(table: dict[str, str]) -> str:
        says = table.get(f"{stage}.{name}", table.get(name, ""))
        return says if set(re.findall(r"'(\w+)'", says) or [says]) & set(known) else ""

    if now := answer(RENAMED):
        return f"'{name}' is now called '{now}'"
    if here := answer(ELSEWHERE):
        return f"'{name}': {here}" if " " in here else f"'{name}' is called '{here}' here"
    return f"unknown dial '{name}'" + nearest(name, known)


def nearest(name: str, known: Collection[str]) -> str:
    """'; did you mean …?' where a known name is close."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean '{close[0]}'?" if close else ""
