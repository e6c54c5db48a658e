"""Loss on held-out rows."""

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.core.losses import next_token_loss
from pipeline.core.tensors import masked_sum
from pipeline.data.tokenize import IGNORE_INDEX, length_batches, pad_rows
from pipeline.runtime.launch import new_accelerator
from pipeline.runtime.precision import autocast


@torch.no_grad()
def validation_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int, precision: str
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token over the labelled tokens of all rows, never smoothed, and their number.

    Rows hold `input_ids` and optionally `labels`; they are shared out over processes.
    """
    accelerator = new_accelerator(precision)
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    ids, labels = rows["input_ids"], rows["labels"] if "labels" in rows.column_names else rows["input_ids"]
    batches = length_batches(list(map(len, ids)), batch_size)
    for part in batches[accelerator.process_index :: accelerator.num_processes]:
        inputs, mask = pad_rows([ids[row] for row in part], tokenizer.pad_token_id, "right")
        targets, _ = pad_rows([labels[row] for row in part], IGNORE_INDEX, "right")
        inputs, mask, targets = (x.to(accelerator.device) for x in (inputs, mask, targets))
        with autocast(precision):
            logits = model(input_ids=inputs, attention_mask=mask.long(), use_cache=False).logits
        losses, counted = next_token_loss(logits, targets, 0.0)
        total += torch.stack([masked_sum(losses, counted).double(), counted.sum().double()])
    total = accelerator.reduce(total, "sum")
    model.train(was_training)
    return (total[0] / total[1]).item(), int(total[1])
