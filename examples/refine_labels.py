"""Clean, train, score again with the better model, until nothing changes (thesis chapter 2).

python examples/refine_labels.py --wrong 0.08 --action drop
"""

import argparse

import torch
from dataopt.core.relation import refine
from sklearn.datasets import load_digits
from torch import Tensor, nn


def main(wrong: float = 0.08, action: str = "drop") -> list[int]:
    """Prints a line for each round; returns how many changed labels each has found."""
    digits = load_digits()
    x, truth = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    g = torch.Generator().manual_seed(0)
    changed = torch.rand(len(truth), generator=g) < wrong
    given = torch.where(changed, (truth + torch.randint(1, 10, truth.shape, generator=g)) % 10, truth)

    def fit(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Train on these rows; features and probabilities of all."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        for _ in range(30):
            for part in torch.randperm(len(rows)).split(64):
                loss = nn.functional.cross_entropy(model(x[rows[part]]), labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            features = model[:2](x)
            return features, model[2](features).softmax(1)

    result = refine(fit, given, action=action, progress=False)
    found = []
    for number, made in enumerate(result.rounds, 1):
        flagged = made.issues.is_label_issue
        found.append(int((flagged & changed).sum()))
        print(f"round {number}: {found[-1]} of {int(changed.sum())} changed labels among {int(flagged.sum())} found")
    print("the last round changed nothing" if result.stable else "stopped before the rounds had settled")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", type=float, default=0.08, help="share of labels to change")
    parser.add_argument("--action", choices=("drop", "relabel"), default="drop")
    main(**vars(parser.parse_args()))
