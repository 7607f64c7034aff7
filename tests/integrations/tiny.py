"""Small data and models for the tests of label cleaning, with the flipped labels known."""

from pathlib import Path

import torch
from dataopt.integrations.cleanable import weighted_loss
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

ROWS, WORDS = 45, 30  # two processes cannot share an odd number evenly
FLIPPED = [4, 11, 30]


class Sentences(Dataset):
    """Word ids; their parity is the class, in most words. The labels of FLIPPED are wrong."""

    def __init__(self, rows: int = ROWS):
        generator = torch.Generator().manual_seed(1)
        true = torch.arange(rows) % 2
        noise = torch.randint(2, (rows, 6), generator=generator) * (torch.rand(rows, 6, generator=generator) < 0.2)
        words = torch.randint(WORDS // 2, (rows, 6), generator=generator) * 2 + true[:, None]
        self.ids = (words + noise) % WORDS
        wrong = [i for i in FLIPPED if i < rows]
        self.labels = true
        self.labels[wrong] = 1 - true[wrong]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.ids[i], "labels": int(self.labels[i])}


def tiny_bert(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def arguments(out: Path, **more) -> TrainingArguments:
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**settings, **more})


class Perceptron(LightningModule):
    """Takes batches (x, y), or (x, y, weight, index) of CleanableDataset. ``lr=0`` only pretends to train."""

    def __init__(self, inputs: int = 64, classes: int = 10, lr: float = 1e-2, dropout: float = 0.2):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(32, classes)
        self.num_classes, self.lr = classes, lr
        self.seen: list = []

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y, *rest = batch
        if rest:
            self.seen.append([t.clone() for t in (y, *rest)])
        return weighted_loss(self(x), y, rest[0] if rest else None)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def trainer(root: Path, *callbacks, epochs: int = 2, **more) -> Trainer:
    settings = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(default_root_dir=root, callbacks=list(callbacks), max_epochs=epochs, **{**settings, **more})
