"""What ``dataopt condense`` and ``dataopt condense eval`` do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .core.artifacts import write_whole
from .core.condense import Condensed, Condenser, ConvNet, RealData, ResNet10, ResNetAP10, Scores, evaluate
from .core.condense.evaluate import BASELINES
from .devices import find_device
from .images import find_images, read_images
from .integrations.hf import hub
from .integrations.hf.condensed import is_published
from .integrations.hf.condensed_images import as_png
from .integrations.hf.inputs import read_labels
from .out_folder import WORK, claimed
from .sources import find_labels, find_source, load_source, split_names

KIND, VERSION, RECORD = "dataopt-condense", 1, "record.json"
PNG_ROW = "condensed, 8 bits"  # a score of the PNG images that a publication holds
_ROWS, _COLUMNS = 20, (10, 16)  # classes, and stored and decoded pictures of each, on a contact sheet at most
_SIDE = 128  # pixels of each at most
_HELD_SEED = 0
_ABOUT = ("scores.json", "condensed.png", "changed.png")  # of the data, and wrong beside other data


@dataclass(frozen=True)
class Network:
    """A network as a command line names it."""

    name: str
    depth: int | None = None
    width: int | None = None

    def build(self, shape: tuple[int, int, int], classes: int) -> Callable[[], nn.Module]:
        """A function that makes it with fresh weights, for (C, H, W) inputs.

        Raises:
            ValueError: an unknown name, or a depth or width that it does not have.
        """
        channels, size = shape[0], shape[1:]
        if self.depth is not None and self.name != "convnet":
            raise ValueError(f"--depth {self.depth} is for convnet, not for {self.name}; leave it out")
        if self.name == "convnet":
            padding = 3 if min(size) == 28 else 1  # as the released code makes 32 of 28
            depth = self.depth or max(2, (min(size) + 2 * padding - 2).bit_length() - 3)  # 3 for 32 pixels, 4 for 64
            return lambda: ConvNet(channels, classes, size, depth, self.width or 128, padding)
        if self.name in ("resnet10", "resnetap10"):
            kind = ResNet10 if self.name == "resnet10" else ResNetAP10
            return lambda: kind(channels, classes, size, self.width or 64)
        if not self.name.startswith("timm:"):
            raise ValueError(f"--network {self.name} must be convnet, resnet10, resnetap10 or timm:NAME")
        if self.width is not None:
            raise ValueError(f"--width {self.width} is for networks of ours, not for {self.name}; leave it out")
        import timm

        name = self.name.removeprefix("timm:")
        return lambda: timm.create_model(name, in_chans=channels, num_classes=classes)


@dataclass(frozen=True)
class Push:
    """Where to upload to, and how; nowhere for ``repo_id=None``."""

    repo_id: str | None = None
    private: bool = False
    licence: str | None = None

    def __call__(self, condensed: Condensed, record: dict[str, Any], scores: Scores | None) -> None:
        if self.repo_id is None:
            return
        from .integrations.hf import push_condensed

        source = record["source"]["name"] if record["source"]["kind"] == "hub" else None
        where = push_condensed(
            condensed, self.repo_id, private=self.private or None, scores=scores, licence=self.licence, source=source
        )
        print(f"Uploaded to {where}")


@dataclass(frozen=True)
class Pictures:
    """A training set, and what was kept out of it: (n, C, H, W) uint8 and (n,) class ids."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def condense(
    dataset: str,
    out: Path,
    network: Network,
    *,
    images_per_class: int,
    factor: str,
    axes: str,
    split: str | None,
    config: str | None,
    revision: str | None,
    input_column: str | None,
    label_column: str | None,
    size: int | None,
    hold_out: float,
    preset: str,
    steps: int,
    init: str | None,
    objective: str,
    lr: float | None,
    early_steps: int | None,
    networks: int | None,
    seed: int,
    device: str,
    compile: bool,
    resume: bool,
    push: Push,
) -> None:
    """Condense a data set and write the folder that ``evaluate_folder`` reads.

    Raises:
        ValueError, TypeError: an argument or a data set that the message names; ``out`` holds something already.
        OSError: nothing of that name, or a full disk; a checkpoint that was written stays.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    settings = {
        "images_per_class": images_per_class, "factor": _factor(factor), "axes": axes, "preset": preset, "init": init,
        "objective": objective, "lr": lr, "early_steps": early_steps, "networks": networks, "seed": seed,
    }  # fmt: skip
    if resume and is_published(out / "condensed.json"):
        raise ValueError(f"--out {out} holds a published data set, which --resume would mix with; give another folder")
    _check_push(push)
    place = find_device(device)
    source = find_source(dataset, split, config, revision)
    data = load_source(source)
    record: dict[str, Any] = {
        "source": source,
        "input_column": find_images(data, input_column),
        "label_column": label_column or find_labels(data),
        "size": size,
        "hold_out": hold_out,
        "network": asdict(network),
    }
    names = class_names(data, record["label_column"])
    pictures = read(data, record, names)
    record["grey"] = pictures.images.shape[1] == 1
    shape = tuple(pictures.images.shape[1:])
    condenser = Condenser(
        network.build(shape, len(names)), **settings, steps=steps, device=place, compile=compile  # type: ignore[arg-type]
    )  # fmt: skip
    with claimed(out, {**record, **settings}, resume, "dataopt condense"):
        condensed = condenser.fit(pictures.images, pictures.labels, label_names=names, resume=out / WORK)
    for name in _ABOUT:
        (out / name).unlink(missing_ok=True)
    condensed.save(out)
    drawn = draw(condensed, condenser.initial, out)
    hub.write_record(out / RECORD, KIND, VERSION, record)
    print(summary(condensed, condenser, drawn, out))
    push(condensed, record, None)


def evaluate_folder(
    folder: Path,
    *,
    test: str | None,
    test_split: str | None,
    networks: Sequence[str],
    seeds: int,
    steps: int,
    epochs: int | None,
    same_compute: bool,
    device: str,
    push: Push,
) -> None:
    """Print the table of scores of a folder that :func:`condense` wrote, and write it to ``scores.json``.

    Raises:
        ValueError: no such folder, no test images, or others than it was made from.
        OSError: a data set that is no longer there.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if same_compute and epochs is None:
        raise ValueError("--same-compute counts steps of --epochs; give both")
    if not (folder / RECORD).is_file():
        begun = (folder / WORK / "arguments.json").is_file()
        remedy = "run dataopt condense to its end with --resume" if begun else "give the --out of dataopt condense"
        raise ValueError(f"{folder} holds no {RECORD}; {remedy}")
    _check_push(push)
    place = find_device(device)
    record = hub.read_record(folder / RECORD, KIND, VERSION)
    condensed = Condensed.load(folder)
    shape, names = tuple(condensed.images.shape[1:]), list(condensed.label_names or ())
    own = Network(**record["network"])
    chosen = [own if name == own.name else Network(name) for name in networks] or [own]
    fns = {n.name: n.build(shape, len(names)) for n in chosen}  # type: ignore[arg-type]
    where = None if record["hold_out"] and not test and not test_split else _test_source(record, test, test_split)
    pictures = read(load_source(record["source"]), record, names)
    held, y = pictures.held_images, pictures.held_labels
    if where is not None:
        data = load_source(where)
        column, labels = (record[key] for key in ("input_column", "label_column"))
        column = find_images(data, column if column in data.column_names else None)
        held = read_images(data, column, record["size"], record["grey"])
        y = _class_ids(data, labels if labels in data.column_names else find_labels(data), names)
    if held.shape[1:] != pictures.images.shape[1:]:
        raise ValueError(f"test images are {_shape(held)} and those condensed {_shape(pictures.images)}; resize them")
    train = pictures.images, pictures.labels

    def evaluated(data: Condensed, **more: Any) -> Scores:
        return evaluate(
            data, train, (held, y), fns, seeds=range(seeds), steps=steps, epochs=epochs, same_compute=same_compute,
            device=place, **more,
        )  # fmt: skip

    baselines: tuple[str, ...] = BASELINES
    if condensed.made["init"] == "herding" and chosen[0] != own:
        baselines = ("random", "herding")
        print(f"No row of the start, which herding chose with {own.name}: it wants --network {own.name} first.\n")
    scores = evaluated(condensed, baselines=baselines)
    rounded = [replace(row, data=PNG_ROW) for row in evaluated(as_png(condensed), baselines=()).rows]
    scores = replace(scores, rows=(*scores.rows, *rounded))
    print(f"{len(held):,} test images; accuracy after the last step, mean and spread over {_seeds(seeds)}:\n")
    print(scores)
    print("\n" + verdict(scores))
    tested: Any = where or {"held out": record["hold_out"]}
    write_whole(folder / "scores.json", json.dumps(report(scores, seeds, tested), indent=1) + "\n")
    print(f"Wrote {folder / 'scores.json'}.")
    push(condensed, record, scores)


def read(data: datasets.Dataset, record: dict[str, Any], names: Sequence[str]) -> Pictures:
    """The training set that a record describes, and what it holds out.

    Raises:
        ValueError: images or labels that the message names.
    """
    labels = _class_ids(data, record["label_column"], names)
    images = read_images(data, record["input_column"], record["size"], record.get("grey"))
    if not record["hold_out"]:
        return Pictures(images, labels, images[:0], labels[:0])
    single = [name for name, count in zip(names, labels.bincount().tolist(), strict=False) if count == 1]
    if single:
        raise ValueError(
            f"the class {single[0]!r:.60} has one image, which --hold-out cannot both keep out and condense; leave the "
            "class out, or test on other images"
        )
    kept, held = RealData(images, labels).split(record["hold_out"], torch.Generator().manual_seed(_HELD_SEED))
    kept, held = kept.sort().values, held.sort().values
    return Pictures(images[kept], labels[kept], images[held], labels[held])


def class_names(data: datasets.Dataset, column: str) -> list[str]:
    """Of a ``ClassLabel``, or the texts or numbers that there are, in order.

    Raises:
        ValueError, TypeError: no such column, or one that holds no labels.
    """
    labels, names = read_labels(data, column)
    return [str(name) for name in (names if names is not None else labels.unique().tolist())]


def _class_ids(data: datasets.Dataset, column: str, names: Sequence[str]) -> Tensor:
    """(n,) places of the labels in ``names``."""
    labels, own = read_labels(data, column)
    values, inverse = labels.unique(return_inverse=True)
    called = [str(own[v] if own is not None else v) for v in values.tolist()]
    places = {name: i for i, name in enumerate(names)}
    unknown = [name for name in called if name not in places]
    if unknown:
        raise ValueError(f"column {column} has the class {unknown[0]!r:.60}, which was not condensed; leave it out")
    return torch.tensor([places[name] for name in called])[inverse]


def draw(condensed: Condensed, initial: Tensor | None, out: Path) -> list[str]:
    """Write ``condensed.png`` and ``changed.png``, and return their names; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from . import plots

    names = list(condensed.label_names or map(str, range(condensed.classes)))[:_ROWS]
    images, labels = condensed.decode()

    def rows(x: Tensor, y: Tensor, columns: int) -> list[Any]:
        size = (min(x.shape[2], _SIDE), min(x.shape[3], _SIDE))
        return [F.adaptive_avg_pool2d(x[y == c][:columns], size).numpy() for c in range(len(names))]

    stored = rows(condensed.images, condensed.labels, _COLUMNS[0])
    figures = {"condensed.png": plots.show_condensed(names, stored, rows(images, labels, _COLUMNS[1]))}
    if initial is not None:
        figures["changed.png"] = plots.show_changes(names, rows(initial, condensed.labels, _COLUMNS[0]), stored)
    for name, figure in figures.items():
        write_whole(out / name, plots.to_png(figure))
    return list(figures)


def summary(condensed: Condensed, condenser: Condenser, drawn: Sequence[str], out: Path) -> str:
    """What ``dataopt condense`` prints."""
    made, source = condensed.made, condensed.made["source"]
    n, shown = len(condensed.images), len(condensed.decode()[1])
    assert condenser.losses is not None
    begin, end = float(condenser.losses[:10].mean()), float(condenser.losses[-10:].mean())
    tiles = f", cut by {condensed.factor} to {shown:,} images to train on" if condensed.factor > 1 else ""
    lines = [
        f"{source['images']:,} images of {_shape(condensed.images)} in {condensed.classes} classes became {n:,} "
        f"({n / source['images']:.2%}){tiles}.",
        f"{made['steps']:,} steps in {made['seconds']:.0f} s on {condenser.device}; matching loss {begin:.4g} at the "
        f"beginning, {end:.4g} at the end.",
        "",
        f"{out / 'condensed.json'}: the data; read it with Condensed.load({str(out)!r})",
    ]
    texts = {"condensed.png": "what is stored and what it is decoded to", "changed.png": "what the steps changed"}
    first = f", of the first {_ROWS} classes" if condensed.classes > _ROWS else ""
    lines += [f"{out / name}: {texts[name]}{first}" for name in drawn]
    if not drawn:
        lines.append('No pictures without matplotlib; get it with: pip install "dataopt[plots]"')
    lines += [
        f"{out / WORK}: for --resume with more --steps; may be deleted",
        f"See what it is worth: dataopt condense eval {out}",
    ]
    return "\n".join(lines)


def verdict(scores: Scores) -> str:
    """The first network's condensed row against each other, in points, and whether the seeds tell them apart."""
    first = scores["condensed"]
    parts = []
    for row in scores.rows:
        if row.network == first.network and row.data != "condensed":
            gap, spread = 100 * (first.mean - row.mean), 100 * math.hypot(first.std, row.std)
            parts.append(f"{gap:+.1f} over {row.data}{' (within the spread)' if abs(gap) <= spread else ''}")
    return f"Condensed, in points: {', '.join(parts)}."


def report(scores: Scores, seeds: int, tested: Any) -> dict[str, Any]:
    """What ``scores.json`` holds."""
    return {
        "test": tested,
        "test_images": scores.test_images,
        "seeds": list(range(seeds)),
        "threads": torch.get_num_threads(),
        "versions": {p: importlib.metadata.version(p) for p in ("dataopt", "torch")},
        "rows": [asdict(row) | {"mean": row.mean, "std": row.std} for row in scores.rows],
        "table": str(scores).splitlines(),
    }


def _test_source(record: dict[str, Any], test: str | None, split: str | None) -> dict[str, Any]:
    source = record["source"]
    if test is None:
        there = split_names(source)
        split = split or "test"
        if split not in there or split == source.get("split"):
            used = source.get("split") or "what was condensed"
            raise ValueError(
                f"{source['name']} has no split {split} beside {used} to test on; give --test-split or --test DATASET, "
                "or condense with --hold-out 0.2"
            )
        return {**source, "split": split}
    found = find_source(test, split, None, None, usual="test", option="--test-split")
    if found == source:
        raise ValueError(f"--test {test} is what was condensed; give other images, or --test-split")
    return found


def _factor(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--factor {text} must be a whole number of at least 1, or auto")
    return int(text)


def _check_push(push: Push) -> None:
    """What would only be noticed after hours."""
    if push.repo_id is None:
        if push.private or push.licence:
            raise ValueError("--private and --licence are for --push; give its ID")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(push.repo_id)
    HfApi().whoami()  # no token, or none that is valid


def _shape(x: Tensor) -> str:
    return f"{x.shape[3]} x {x.shape[2]} {'grey' if x.shape[1] == 1 else 'colour'} pixels"


def _seeds(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"
