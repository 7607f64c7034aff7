"""Class-incremental learning with a small memory: accuracy over the classes seen so far (thesis, figure 6.7).

    python examples/continual_learning.py                                  # scikit-learn's digits, about two minutes
    python examples/continual_learning.py --data path/to/cifar10 --images-per-class 10 --factor 2 --width 32

The classes come in steps. At each step the memory gets the images of the new classes alone, and keeps a few pictures of
each class; networks are then trained on nothing but the memory, with as many steps for every method, and tested on all
classes so far. ``--data`` is a folder of images or of parquet files with the splits train and test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from dataopt import plots
from dataopt.core.artifacts import write_whole
from dataopt.core.condense import Condenser, ConvNet, ExemplarMemory, ResNet10, evaluate
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

METHODS = ("random", "condensed", "init", "herding")  # as the picture colours them: grey, blue, red, orange
Data = tuple[Tensor, Tensor]  # images (n, C, H, W) and class ids (n,)


def digits() -> tuple[Data, Data]:
    """1,297 digits to learn from and 500 to test on, 8 x 8 pixels."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)
    rows = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=0)
    train, test = (torch.tensor(r) for r in rows)
    return (images[train], labels[train]), (images[test], labels[test])


def folder(path: Path) -> tuple[Data, Data]:
    """The splits train and test of a folder."""
    from dataopt.images import find_images, read_images
    from dataopt.integrations.hf.inputs import read_labels
    from dataopt.sources import find_labels, load_source

    out = []
    for split in ("train", "test"):
        files = [str(f.resolve()) for f in sorted(path.glob(f"{split}*.parquet"))]
        source = {"kind": "files", "name": files} if files else {"kind": "folder", "name": str(path), "split": split}
        data = load_source(source)
        out.append((read_images(data, find_images(data, None), None), read_labels(data, find_labels(data))[0]))
    return out[0], out[1]


def of_classes(data: Data, ids: range) -> Data:
    rows = ((data[1] >= ids.start) & (data[1] < ids.stop)).nonzero().squeeze(1)
    return data[0][rows], data[1][rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the splits train and test; the default is the digits")
    parser.add_argument("--classes-per-step", type=int, default=2)
    parser.add_argument("--images-per-class", type=int, default=1, help="stored for each class")
    parser.add_argument("--factor", type=int, default=1, help="tiles a side of a stored picture")
    parser.add_argument("--width", type=int, default=32, help="of the networks; 128 in the thesis")
    parser.add_argument("--steps", type=int, default=150, help="of condensing, at each step of classes")
    parser.add_argument("--early-steps", type=int, default=0, help="of the networks that condense, before they do")
    parser.add_argument("--training-steps", type=int, default=300, help="of each network that is tested")
    parser.add_argument("--seeds", type=int, default=3, help="networks for each point")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("continual"))
    args = parser.parse_args(arguments)

    train, test = folder(args.data) if args.data else digits()
    channels, *size = train[0].shape[1:]
    classes = int(train[1].max()) + 1
    depth = 2 if min(size) < 28 else 3

    def convnet() -> ConvNet:
        return ConvNet(channels, classes, tuple(size), depth, args.width)

    networks = {f"ConvNet-{depth}": convnet}
    if min(size) >= 28:  # condensed with the one, tested with both
        networks["ResNet-10"] = lambda: ResNet10(channels, classes, tuple(size), args.width // 2)
    condenser = Condenser(
        convnet,
        args.images_per_class,
        args.factor,
        steps=args.steps,
        device=args.device,
        repeats=2 if depth == 2 else 4,
        early_steps=args.early_steps,
    )
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = {name: {} for name in networks}
    for method in args.methods:
        memory = ExemplarMemory(condenser, method)
        for start in range(0, classes, args.classes_per_step):
            seen = range(min(start + args.classes_per_step, classes))
            memory.add(*of_classes(train, range(start, seen.stop)))  # older images are gone
            scores = evaluate(
                memory.stored, of_classes(train, seen), of_classes(test, seen), networks, seeds=range(args.seeds),
                steps=args.training_steps, baselines=(), device=args.device,
            )  # fmt: skip
            for row in scores.rows:
                x, y = curves[row.network].setdefault(method, ([], []))
                x.append(seen.stop)
                y.append(100 * row.mean)
                print(
                    f"{row.network}, {method:9} {seen.stop:3} classes: {y[-1]:5.1f} ± {100 * row.std:.1f} %", flush=True
                )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_whole(args.out / "continual.json", json.dumps({"settings": settings, "curves": curves}, indent=1) + "\n")
    titles = {f"{name}: accuracy, %": points for name, points in curves.items()}
    write_whole(args.out / "continual.png", plots.to_png(plots.show_curves(titles, "classes seen")))
    print(f"Wrote {args.out / 'continual.png'} and continual.json.")


if __name__ == "__main__":
    main()
