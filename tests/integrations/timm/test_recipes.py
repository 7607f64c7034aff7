"""The recipes hold the settings behind the thesis' tables, and each runs for an epoch of two batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from dataopt.integrations.timm.task import TASKS

from .conftest import needs_script, weights

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"

# columns of the released settings of Puzzle Mix: beta, neigh_size, transport patch, clean weight, batch of all
# processes, epochs
RELEASED = {
    "cifar100_preact_resnet18": (1.2, 4, 4, 0.0, 100, 1200),
    "cifar100_wrn28_10": (1.2, 4, 4, 0.0, 100, 400),
    "tiny_imagenet_preact_resnet18": (1.2, 4, None, 1.0, 100, 1200),
    "imagenet_resnet50_300ep": (1.2, 4, None, 0.0, 4 * 64, 300),
    "imagenet_resnet50_100ep": (1.5, 2, None, 1.0, 4 * 112, 100),
}
# and of Co-Mixup's: alpha, partition, sweeps, batch of all processes, epochs, learning rate (None: piecewise linear)
CO_RELEASED = {
    "cifar100_preact_resnet18_comixup": (2.0, 20, 4, 100, 300, 0.2),
    "tiny_imagenet_preact_resnet18_comixup": (2.0, 20, 4, 100, 1200, 0.2),
    "imagenet_resnet50_100ep_comixup": (1.0, 16, 3, 4 * 112, 100, None),
}
each = pytest.mark.parametrize("name", [*RELEASED, *CO_RELEASED])


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def test_there_is_one_recipe_for_each_released_setting():
    assert {p.stem for p in RECIPES.iterdir()} == {*RELEASED, *CO_RELEASED}


@each
def test_a_recipe_trains_as_the_released_code(name):
    recipe = load(name)
    batch, epochs = RELEASED[name][-2:] if name in RELEASED else CO_RELEASED[name][3:5]
    assert recipe["batch_size"] * (4 if name.startswith("imagenet") else 1) == batch
    assert (recipe["epochs"], recipe["smoothing"]) == (epochs, 0.0)
    assert (recipe["weight_decay"], recipe["momentum"]) == (1e-4, 0.9)
    assert timm.is_model(recipe["model"])


@pytest.mark.parametrize("name", RELEASED)
def test_a_recipe_of_puzzle_mix_holds_the_released_values(name):
    recipe = load(name)
    beta, neigh_size, patch, clean, *_ = RELEASED[name]
    assert (recipe["puzzle_beta"], recipe["puzzle_neigh_size"]) == (beta, neigh_size)
    assert (recipe.get("puzzle_transport_patch"), recipe["puzzle_clean_weight"]) == (patch, clean)
    assert (recipe["puzzle_alpha"], recipe["puzzle_gamma"], recipe["puzzle_eta"]) == (1.0, 0.5, 0.2)
    assert (recipe["puzzle_labels"], recipe["puzzle_grids"]) == (3, [2, 4, 8, 16])
    assert (recipe["mixup"], recipe["puzzle_transport_cost"]) == ("puzzle", 0.8)


@pytest.mark.parametrize("name", CO_RELEASED)
def test_a_recipe_of_co_mixup_holds_the_released_values(name):
    recipe = load(name)
    alpha, partition, sweeps, _, epochs, lr = CO_RELEASED[name]
    assert (recipe["comixup_alpha"], recipe["comixup_n_iter"]) == (alpha, sweeps)
    assert (recipe["comixup_beta"], recipe["comixup_gamma"], recipe["comixup_eta"]) == (0.32, 1.0, 0.05)
    assert (recipe["comixup_tau"], recipe["comixup_threshold"], recipe["comixup_omega"]) == (0.83, "hard", 0.001)
    assert (recipe["mixup"], recipe["comixup_grid"], recipe["comixup_clean_weight"]) == ("comixup", 4, 1.0)
    assert recipe["comixup_partition"] == partition and recipe["batch_size"] % partition == 0  # all are whole
    if lr is not None:
        assert recipe["lr"] == lr and recipe["decay_milestones"] == {300: [100, 200], 1200: [600, 900]}[epochs]


@pytest.mark.parametrize("name", [name for name in (*RELEASED, *CO_RELEASED) if not name.startswith("imagenet")])
def test_a_recipes_model_ends_as_the_released_one(name):
    recipe = load(name)
    side = recipe["input_size"][-1]
    model = timm.create_model(recipe["model"], num_classes=recipe["num_classes"], **recipe["model_kwargs"])
    assert model.feature_info[-1]["reduction"] == 8 and side in (32, 64)


def small(name: str, image_folder: Path) -> list[object]:
    """The recipe on generated images and a tiny model; every value of the method is the recipe's."""
    size = min(64, load(name)["input_size"][-1])
    model = ["--model", "test_resnet", "--model-kwargs", "", "--input-size", 3, size, size, "--img-size", size]
    return ["-c", RECIPES / f"{name}.yaml", "--dataset", "", "--data-dir", image_folder, *model, "--num-classes",
            load(name)["num_classes"]]  # fmt: skip


def check(steps: list[dict[str, Any]], name: str) -> None:
    recipe = load(name)
    assert len(steps) == 2 and all(s["mixed"] is not None for s in steps)
    mixer, method = steps[0]["task"].mixer, recipe["mixup"]
    assert isinstance(steps[0]["task"], TASKS[method])
    assert mixer.clean_weight == recipe[f"{method}_clean_weight"] and mixer.smoothing == 0
    given = {key.removeprefix(f"{method}_"): value for key, value in recipe.items() if key.startswith(f"{method}_")}
    for key in given.keys() - {"clean_weight"}:
        assert getattr(mixer.mix, key) == (tuple(given[key]) if key == "grids" else given[key]), key
    assert list(mixer.mean) == recipe["mean"] and list(mixer.std) == recipe["std"]
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
