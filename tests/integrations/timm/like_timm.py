"""Not a test: a script with the shape of timm's train.py, newer than the one that tests may have at hand.

What is newer: the configuration's strings are converted by the options' types, ``_parse_args`` compares
``--mixup`` with 0, and ``ClassificationTask`` gets ``criterion_kwargs``.
"""

import argparse
import os

import torch
import yaml
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.task import ClassificationTask, MultiLabelClassificationTask

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser(description="A script like timm's")
parser.add_argument("data", nargs="?")
parser.add_argument("--data-dir")
parser.add_argument("--dataset", default="")
parser.add_argument("--train-split", default="train")
parser.add_argument("--val-split", default="validation")
parser.add_argument("--class-map", default="")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--cutmix", type=float, default=0.0)
parser.add_argument("--cutmix-minmax", type=float, nargs="+", default=None)
parser.add_argument("--mixup-prob", type=float, default=1.0)
parser.add_argument("--mixup-switch-prob", type=float, default=0.5)
parser.add_argument("--mixup-mode", default="batch")
parser.add_argument("--mixup-off-epoch", type=int, default=0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--loss", default="ce")
parser.add_argument("--task", default="classification")
parser.add_argument("--kd-model-name", default=None)
parser.add_argument("--naflex-loader", action="store_true")
parser.add_argument("--aug-splits", type=int, default=0)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--num-classes", type=int, default=4)
parser.add_argument("--output", default="")
parser.add_argument("--bypass-task", action="store_true", help="call the model, not the task")
parser.add_argument("--another-task", action="store_true", help="build a task of its own")


def _parse_args():
    given, rest = config_parser.parse_known_args()
    if given.config:
        with open(given.config) as f:
            values = yaml.safe_load(f)
        for action in parser._actions:
            if action.type is not None and isinstance(values.get(action.dest), str):
                values[action.dest] = action.type(values[action.dest])
        parser.set_defaults(**values)
    args = parser.parse_args(rest)
    text = yaml.safe_dump(vars(args), default_flow_style=False)
    soft = args.mixup > 0 or args.cutmix > 0
    args.loss_kwargs = dict(loss_type=args.loss, smoothing=args.smoothing, soft_targets=soft)
    return args, text


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    model.train()
    for x, y in loader:
        result = {"loss": model(x).mean()} if args.bypass_task else task(x, y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return {"loss": result["loss"].item()}


def loaders(args):
    """As timm's script makes them; None where the command line names no data."""
    root = args.data_dir or args.data
    if not root and not args.dataset:
        return None
    found = []
    for training, split in ((True, args.train_split), (False, args.val_split)):
        if split:
            dataset = create_dataset(
                args.dataset, root=root, split=split, is_training=training, class_map=args.class_map, batch_size=8,
                input_img_mode="RGB",
            )  # fmt: skip
            found.append(create_loader(
                dataset, (3, 32, 32), 8, is_training=training, no_aug=True, use_prefetcher=False, crop_pct=1.0,
                interpolation="bilinear", num_workers=args.workers, device=torch.device("cpu"),
            ))  # fmt: skip
    return found


def main():
    args, text = _parse_args()
    torch.manual_seed(args.seed)
    model = create_model("test_resnet", num_classes=args.num_classes)
    build = MultiLabelClassificationTask if args.another_task else ClassificationTask
    if args.another_task:
        args.loss_kwargs["loss_type"] = "bce"
    task = build(model=model, criterion_kwargs=args.loss_kwargs, verbose=False)
    assert isinstance(task, build)
    pixels = torch.rand(2, 8, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    labels = torch.arange(8) % args.num_classes
    if args.loss_kwargs["soft_targets"]:
        labels = torch.nn.functional.one_hot(labels, args.num_classes).float()
    batches = [((x - mean) / std, labels) for x in pixels]
    real = loaders(args)
    if real is not None:
        batches = real[0]
        for x, _ in real[1] if len(real) > 1 else ():
            model.eval()(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for epoch in range(args.epochs):
        train_one_epoch(epoch, model, batches, optimizer, args, task=task)
    if args.output:
        with open(os.path.join(args.output, "args.yaml"), "w") as f:
            f.write(text)
        with open(os.path.join(args.output, "logged.yaml"), "w") as f:  # as wandb.init(config=args) has it
            yaml.safe_dump(vars(args), f)
        torch.save(model.state_dict(), os.path.join(args.output, "model.pt"))


if __name__ == "__main__":
    main()
