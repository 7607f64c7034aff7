"""Train with the transformers ``Trainer`` on a condensed data set, and test on real images.

    python examples/condensed_trainer.py me/cifar10-idc --test uoft-cs/cifar10 --steps 1000

SOURCE is a repository or a folder; the test data is a data set of the Hub or a folder that ``load_dataset`` reads.
"""

import argparse

import numpy as np
import torch
from dataopt.integrations.hf import load_condensed, read_condensed
from datasets import load_dataset
from torchvision.transforms import v2
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--test", metavar="DATASET", help="none: train only")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--image-column", default="image", help="of the test data")
    parser.add_argument("--label-column", default="label", help="of the test data")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", default="condensed-training")
    args = parser.parse_args(argv)

    condensed = read_condensed(args.source)  # for the size of the images, and their mean and standard deviation
    channels, height, width = condensed.images.shape[1:]
    mean, std = condensed.mean or (0.0,) * channels, condensed.std or (1.0,) * channels
    pixels = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    shown = [v2.RandomCrop((height, width), padding=max(height, width) // 8), v2.RandomHorizontalFlip()]
    augment = v2.Compose([v2.ToImage(), *shown, *pixels])
    plain = v2.Compose([v2.ToImage(), v2.Resize((height, width)), *pixels])

    def rows(transform, image="image", label="label"):
        mode = "RGB" if channels == 3 else "L"
        return lambda batch: {
            "pixel_values": [transform(picture.convert(mode)) for picture in batch[image]],
            "labels": batch[label],
        }

    train = load_condensed(args.source).with_transform(rows(augment))
    test = None
    if args.test:
        test = load_dataset(args.test, split=args.test_split)
        test = test.with_transform(rows(plain, args.image_column, args.label_column))

    config = ResNetConfig(
        num_channels=channels, embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
        num_labels=len(condensed.label_names or range(condensed.classes)),
    )  # fmt: skip
    settings = TrainingArguments(
        args.out, max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
        per_device_eval_batch_size=256, lr_scheduler_type="cosine", remove_unused_columns=False, save_strategy="no",
        report_to=[],
    )  # fmt: skip
    trainer = Trainer(
        ResNetForImageClassification(config),
        settings,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    )
    results = dict(trainer.train().metrics)
    if test is not None:
        results |= trainer.evaluate()
        print(f"{len(train)} images, {args.steps} steps: accuracy {100 * results['eval_accuracy']:.1f} %")
    return results


if __name__ == "__main__":
    main()
