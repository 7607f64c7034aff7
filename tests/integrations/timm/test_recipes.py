"""The recipes hold the settings behind the thesis' tables, and each runs for an epoch of two batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from .conftest import needs_script, weights

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"

# columns of the released settings: beta, neigh_size, transport patch, clean weight, batch of all processes, epochs
RELEASED = {
    "cifar100_preact_resnet18": (1.2, 4, 4, 0.0, 100, 1200),
    "cifar100_wrn28_10": (1.2, 4, 4, 0.0, 100, 400),
    "tiny_imagenet_preact_resnet18": (1.2, 4, None, 1.0, 100, 1200),
    "imagenet_resnet50_300ep": (1.2, 4, None, 0.0, 4 * 64, 300),
    "imagenet_resnet50_100ep": (1.5, 2, None, 1.0, 4 * 112, 100),
}
each = pytest.mark.parametrize("name", RELEASED)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def test_there_is_one_recipe_for_each_released_setting():
    assert {p.stem for p in RECIPES.iterdir()} == set(RELEASED)


@each
def test_a_recipe_holds_the_released_values(name):
    recipe = load(name)
    beta, neigh_size, patch, clean, batch, epochs = RELEASED[name]
    assert (recipe["puzzle_beta"], recipe["puzzle_neigh_size"]) == (beta, neigh_size)
    assert (recipe.get("puzzle_transport_patch"), recipe["puzzle_clean_weight"]) == (patch, clean)
    assert (recipe["puzzle_alpha"], recipe["puzzle_gamma"], recipe["puzzle_eta"]) == (1.0, 0.5, 0.2)
    assert (recipe["puzzle_labels"], recipe["puzzle_grids"]) == (3, [2, 4, 8, 16])
    assert recipe["puzzle_transport_cost"] == 0.8
    assert recipe["batch_size"] * (4 if name.startswith("imagenet") else 1) == batch
    assert (recipe["epochs"], recipe["smoothing"]) == (epochs, 0.0)
    assert (recipe["weight_decay"], recipe["momentum"]) == (1e-4, 0.9)
    assert timm.is_model(recipe["model"])


@pytest.mark.parametrize("name", ["cifar100_preact_resnet18", "cifar100_wrn28_10", "tiny_imagenet_preact_resnet18"])
def test_a_recipes_model_ends_as_the_released_one(name):
    recipe = load(name)
    side = recipe["input_size"][-1]
    model = timm.create_model(recipe["model"], num_classes=recipe["num_classes"], **recipe["model_kwargs"])
    assert model.feature_info[-1]["reduction"] == 8 and side in (32, 64)


def small(name: str, image_folder: Path) -> list[object]:
    """The recipe on generated images and a tiny model; every --puzzle-* value is the recipe's."""
    size = min(64, load(name)["input_size"][-1])
    model = ["--model", "test_resnet", "--model-kwargs", "", "--input-size", 3, size, size, "--img-size", size]
    return ["-c", RECIPES / f"{name}.yaml", "--dataset", "", "--data-dir", image_folder, *model, "--num-classes",
            load(name)["num_classes"]]  # fmt: skip


def check(steps: list[dict[str, Any]], name: str) -> None:
    recipe = load(name)
    assert len(steps) == 2 and all(s["mixed"] is not None for s in steps)
    mixer = steps[0]["task"].mixer
    assert mixer.clean_weight == recipe["puzzle_clean_weight"] and mixer.smoothing == 0
    assert (mixer.mix.beta, mixer.mix.neigh_size) == (recipe["puzzle_beta"], recipe["puzzle_neigh_size"])
    assert mixer.mix.transport_patch == recipe.get("puzzle_transport_patch")
    assert list(mixer.mix.mean) == recipe["mean"] and list(mixer.mix.std) == recipe["std"]
    assert mixer.mix.num_classes == recipe["num_classes"]


@each
def test_a_recipe_runs(train, steps, image_folder, name):
    folder = train(*small(name, image_folder))
    check(steps, name)
    assert weights(folder)


def test_the_adversarial_variant_is_one_flag(train, steps, image_folder):
    train(*small("cifar100_preact_resnet18", image_folder), "--puzzle-adv-prob", 0.1)
    adversarial = steps[0]["task"].mixer.mix.adversarial
    assert (adversarial.p, adversarial.eps, adversarial.step) == (0.1, 10 / 255, 12 / 255)


@needs_script
@each
def test_timms_script_reads_a_recipe(train_script, steps, image_folder, name):
    train_script(*small(name, image_folder))
    check(steps, name)
