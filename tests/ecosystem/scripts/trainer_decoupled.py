"""Sentences with one of two words in them, told apart by a small BERT: Trainer of transformers.

usage: python script.py folder
"""

import sys

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dni_fx import decouple, one_hot

set_seed(0)
generator = np.random.default_rng(0)


def sentence(label):
    words = [3 + label, *generator.integers(10, 100, generator.integers(3, 12))]
    return {"input_ids": generator.permutation(words).tolist(), "labels": label}


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    texts = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": torch.tensor(texts),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def metrics(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


sentences = [sentence(i % 2) for i in range(384)]
config = BertConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=16,
)
model = BertForSequenceClassification(config)
cut = decouple(model, ["bert.encoder.layer.0", "bert.encoder.layer.1"], gradients="local", context=one_hot(2))  # fmt: skip  # noqa: E501
model = cut.as_module(context=lambda *_, labels, **__: labels)
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    num_train_epochs=4,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    logging_steps=4,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
trainer = Trainer(
    model,
    arguments,
    data_collator=collate,
    train_dataset=sentences[:256],
    eval_dataset=sentences[256:],
    compute_metrics=metrics,
)
trainer.train()
result = trainer.evaluate()
trainer.save_model()
