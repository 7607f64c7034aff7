"""Puzzle Mix and Co-Mixup inside the transformers Trainer."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataopt.core.mixup import CoMixup, CutMix, PuzzleMix, augmix, input_gradient, saliency
from dataopt.integrations.hf import (
    CleanableDataset,
    CoMixupTrainerMixin,
    LabelCleaningCallback,
    PuzzleMixTrainerMixin,
    mixup_trainer,
)
from dataopt.integrations.hf.mixup_inputs import mix_text, padded_embeddings, padded_length
from dataopt.integrations.mixing import batch_generator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from .tiny import sound_model

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


class Rows(Dataset):
    def __init__(self, classes: int = 4, **columns):
        self.columns = columns
        n = len(next(iter(columns.values())))
        self.columns["labels"] = torch.arange(n) % classes

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict:
        return {name: column[i] for name, column in self.columns.items()}


class Ordered(Rows):
    """Keeps the numbers of the rows in the order in which they are read."""

    def __init__(self, **columns):
        super().__init__(**columns)
        self.read: list = []

    def __getitem__(self, i: int) -> dict:
        self.read.append(i)
        return super().__getitem__(i)


class Images(Rows):
    def __init__(self, n: int = 16):
        super().__init__(pixel_values=torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def tiny_vit(**config) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, **{"num_labels": 4, **config}))


def tiny_resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes = dict(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(ResNetConfig(**sizes))


def arguments(out: Path, **more) -> TrainingArguments:
    settings = {
        "num_train_epochs": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [], "seed": 3,
        "save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**settings, **more})


class Seen(list):
    """(inputs of the model, whether it trained) of every call, and the soft targets of every loss."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.targets: list = []
        self.names: list = []
        model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, module, args, kwargs):
        self.append(
            ({name: t.detach().clone() for name, t in kwargs.items() if isinstance(t, torch.Tensor)}, module.training)
        )
        self.names.append(sorted(kwargs))

    def loss(self, logits, targets):
        self.targets.append(targets.clone())
        return F.cross_entropy(logits, targets)


def train(out, model, data, method: str = "puzzle", mixup=None, callbacks=(), resume=None, evaluate=None, **args):
    seen = Seen(model)
    made = mixup_trainer(method)(
        model, arguments(out, **args), train_dataset=data, eval_dataset=evaluate, callbacks=list(callbacks),
        mixup={"loss_fn": seen.loss, **(mixup or {})},
    )  # fmt: skip
    seen.targets.clear()  # the loss has been tried
    made.train(resume_from_checkpoint=resume)
    return made, seen


def labels_of(x: torch.Tensor, column: torch.Tensor, data: Rows) -> torch.Tensor:
    rows = [next(i for i, row in enumerate(column) if torch.equal(row, sample)) for sample in x]
    return data.columns["labels"][rows]


def expected(mix, model, key, x, y, step, autocast=False):
    """What core makes of a batch with the generator of that step; (B, T, F) are images of one channel."""
    whole = x if x.ndim == 4 else x.unsqueeze(1)

    def forward(t):
        return model(**{key: t if x.ndim == 4 else t.squeeze(1)}).logits

    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        s = saliency(input_gradient(forward, whole, y))
    return mix(whole, y, s, generator=batch_generator(0, step))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method, mix", [("puzzle", PuzzleMix(4)), ("comixup", CoMixup(4, beta=0.05))])
def test_the_model_trains_on_what_core_makes(tmp_path, method, mix, bf16):
    data, model = Images(), tiny_vit()
    start = copy.deepcopy(model)
    settings = {} if method == "puzzle" else {"beta": 0.05}
    _, seen = train(tmp_path, model, data, method, settings, bf16=bf16, learning_rate=0.0, num_train_epochs=2)
    assert [training for _, training in seen] == [False, True] * 4
    for step, ((clean, _), (shown, _)) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        x = clean["pixel_values"]
        y = labels_of(x, data.columns["pixel_values"], data)
        m = expected(mix, start, "pixel_values", x, y, step, bf16)
        assert torch.equal(shown["pixel_values"], m.inputs) and torch.equal(seen.targets[step], m.targets)
    assert torch.cat(seen.targets).max(1).values.min() < 0.9
    assert all("labels" not in names for names in seen.names)


@pytest.mark.parametrize(
    "method, mix", [("puzzle", PuzzleMix(4, mean=[0.5] * 3, std=[0.5] * 3)), ("comixup", CoMixup(4))]
)
def test_augmix_images_are_mixed(tmp_path, method, mix):
    data, model = Ordered(pixel_values=torch.rand(8, 3, 16, 16)), tiny_vit()
    start = copy.deepcopy(model).eval()
    # pixels are 0.5 x + 0.5: all of x is in their range
    settings = {"augment": "augmix", "mean": [0.5] * 3, "std": [0.5] * 3}
    _, seen = train(tmp_path, model, data, method, settings, learning_rate=0.0)
    x, y = data.columns["pixel_values"][data.read], data.columns["labels"][data.read]
    generator = batch_generator(0, 0)
    images = augmix(x, generator, mean=[0.5] * 3, std=[0.5] * 3)
    assert torch.equal(seen[0][0]["pixel_values"], images) and not torch.equal(images, x)
    s = saliency(input_gradient(lambda t: start(pixel_values=t).logits, images, y))
    m = mix(images, y, s, generator=generator)
    assert torch.equal(seen[1][0]["pixel_values"], m.inputs) and torch.equal(seen.targets[0], m.targets)


def test_spectrograms_are_images_of_one_channel(tmp_path):
    torch.manual_seed(0)
    config = dict(patch_size=4, time_stride=4, frequency_stride=4, max_length=32, num_mel_bins=16, num_labels=4)
    model = ASTForAudioClassification(ASTConfig(**SMALL, **config))
    start, data = copy.deepcopy(model), Rows(input_values=torch.randn(8, 32, 16))
    _, seen = train(tmp_path, model, data, mixup={"grids": [[8, 1]]}, learning_rate=0.0)
    x = seen[0][0]["input_values"]
    y = labels_of(x, data.columns["input_values"], data)
    m = expected(PuzzleMix(4, gamma=0, grids=[(8, 1)]), start, "input_values", x, y, 0)
    assert torch.equal(seen[1][0]["input_values"], m.inputs.squeeze(1)) and seen[1][1]


def test_sound_is_mixed_along_time_with_its_attention(tmp_path):
    model = sound_model()[0]
    samples = torch.randn(8, 480, generator=torch.Generator().manual_seed(0))
    attention = torch.ones(8, 480, dtype=torch.long)
    attention[::2, 240:] = 0
    data = Rows(2, input_values=samples * attention, attention_mask=attention)
    _, seen = train(tmp_path, model, data, "comixup", {"grid": 8}, learning_rate=0.0)
    shown = seen[1][0]
    regions, attended = (shown[name].unflatten(1, (8, 60)) for name in ("input_values", "attention_mask"))
    assert torch.equal(attended.amin(2), attended.amax(2))  # whole regions
    assert torch.equal(attended.amax(2) == 1, regions.abs().amax(2) > 0)
    assert not torch.equal(shown["attention_mask"], seen[0][0]["attention_mask"])


def test_evaluation_is_the_trainers(tmp_path):
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    measured = []
    for made in (Trainer, mixup_trainer("puzzle"), mixup_trainer("comixup")):
        model = tiny_vit(initializer_range=1.0)
        args = arguments(tmp_path, learning_rate=0.0, eval_strategy="epoch")
        trainer = made(model, args, train_dataset=Images(), eval_dataset=Images(), compute_metrics=accuracy)
        trainer.train()
        measured.append([trainer.evaluate()[name] for name in ("eval_loss", "eval_accuracy")])
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert set(logged) == {measured[-1][0]}  # in training and after it
    assert measured[0] == measured[1] == measured[2] and measured[0][0] > 0


@pytest.mark.parametrize("method", ["puzzle", "comixup"])
def test_accumulation_is_one_large_batch_of_the_same_mixed_samples(tmp_path, method):
    model = tiny_vit()
    start = copy.deepcopy(model)
    _, seen = train(tmp_path, model, Images(), method, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    x = torch.cat([inputs["pixel_values"] for inputs, training in seen if training])
    assert x.shape[0] == 16 and len(seen.targets) == 2
    assert all(t.min() >= 0.1 / 4 - 1e-6 for t in seen.targets)
    loss = F.cross_entropy(start(pixel_values=x).logits, torch.cat(seen.targets))
    for p, before, g in zip(
        model.parameters(), start.parameters(), torch.autograd.grad(loss, list(start.parameters())), strict=True
    ):
        torch.testing.assert_close(p, before - 0.1 * g, rtol=1e-5, atol=1e-6)


def test_clean_weight_adds_the_clean_loss(tmp_path):
    model = tiny_vit()
    start, data = copy.deepcopy(model), Images(8)
    _, seen = train(tmp_path, model, data, "comixup", {"clean_weight": 0.5})
    (clean, _), (shown, _) = seen
    y = labels_of(clean["pixel_values"], data.columns["pixel_values"], data)
    loss = F.cross_entropy(start(**shown).logits, seen.targets[0]) + 0.5 * F.cross_entropy(start(**clean).logits, y)
    for p, before, g in zip(
        model.parameters(), start.parameters(), torch.autograd.grad(loss, list(start.parameters())), strict=True
    ):
        torch.testing.assert_close(p, before - 0.1 * g, rtol=1e-5, atol=1e-6)


def test_probability_switch_off_epoch_and_cutmix(tmp_path):
    data = Images()
    settings = dict(prob=0.5, cutmix_alpha=1.0, off_epoch=6)
    _, seen = train(tmp_path, tiny_vit(), data, mixup=settings, num_train_epochs=7)
    shown = [inputs["pixel_values"] for inputs, training in seen if training]
    originals = [any(torch.equal(x[0], row) for row in data.columns["pixel_values"]) for x in shown]
    passes = len(seen) - len(shown)  # of the saliency, which CutMix does not need
    hard = [bool((t.amax(1) == 1).all()) for t in seen.targets]
    assert 0 < passes < sum(not h for h in hard) and 2 < sum(hard) < 12
    assert hard[12:] == [True, True] == originals[12:]


def test_statistics_and_pictures_are_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = dict(logging_strategy="steps", logging_steps=2, report_to=["tensorboard"])
    mixup = {"log_every": 3, "beta": 0.05}
    made, seen = train(tmp_path, tiny_vit(), Images(32), "comixup", mixup, evaluate=Images(8), **settings)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    images = events.Images("mixup/examples")
    assert [(image.step, image.height, image.width) for image in images] == [
        (s, 2 * 18 - 2, 8 * 18 - 2) for s in (0, 3)
    ]
    for image, step in zip(images, (0, 3), strict=True):  # the clean batch above the mixed one
        shown = [inputs["pixel_values"] for inputs, _ in seen[2 * step : 2 * step + 2]]
        low, high = torch.stack(shown).aminmax()
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) / 255
        for line, x in enumerate(shown):
            first = ((x[0] - low) / (high - low)).permute(1, 2, 0)
            np.testing.assert_allclose(pixels[18 * line : 18 * line + 16, :16], first, atol=1 / 255)
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["mixup_mixed"] == 1 for entry in logged)
    assert all(entry["mixup_inputs_per_output"] > 1 and 0 < entry["mixup_largest_share"] < 1 for entry in logged)
    for name in ("mixed", "inputs_per_output", "largest_share", "seconds"):
        found = [(s.step, s.value) for s in events.Scalars(f"train/mixup_{name}")]
        assert found == [(entry["step"], pytest.approx(entry[f"mixup_{name}"])) for entry in logged]
    assert not any(
        name.startswith("mixup") for entry in made.state.log_history if "loss" not in entry for name in entry
    )


def test_resumed_training_goes_on_with_the_same_draws(tmp_path):
    whole, seen = train(tmp_path, tiny_resnet(), Images(), mixup={"seed": 5}, save_strategy="epoch", num_train_epochs=2)
    saved = tmp_path / "checkpoint-2"
    assert json.loads((saved / "mixup.json").read_text()) == {"seed": 5, "step": 2}
    again, rest = train(tmp_path, tiny_resnet(), Images(), mixup={"seed": 1}, resume=str(saved), num_train_epochs=2)
    assert again.mixing.state_dict() == whole.mixing.state_dict() == {"seed": 5, "step": 4}
    assert len(rest) == 4
    for (a, _), (b, _) in zip(seen[4:], rest, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def bert(**config) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": 30, "max_position_embeddings": 14}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=2, **config))


def sentences(n: int = 8) -> Rows:
    """14 tokens, of which the last ones of some are padding; token 1 begins each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30, (n, 14), generator=generator)
    ids[:, 0] = 1
    attention = (torch.arange(14) < torch.randint(4, 15, (n, 1), generator=generator)).long()
    return Rows(2, input_ids=ids * attention, attention_mask=attention, token_type_ids=torch.zeros_like(ids))


def test_text_is_mixed_along_the_sequence(tmp_path):
    model, data = bert(), sentences()
    start = copy.deepcopy(model)
    _, seen = train(tmp_path, model, data, mixup={"grids": [4]})
    assert ["input_ids" in inputs for inputs, _ in seen] == [True, False, False, False]  # tried, saliency, training
    clean, (shown, training) = seen[0][0], seen[-1]
    assert training
    column = data.columns["attention_mask"]
    ids = seen[0][0]["input_ids"]  # its last column is padding, as tried
    y = torch.tensor([data.columns["labels"][i] for row in ids for i in range(8)
                      if torch.equal(row[:13], data.columns["input_ids"][i][:13])])  # fmt: skip
    rows = [i for row in ids for i in range(8) if torch.equal(row[:13], data.columns["input_ids"][i][:13])]
    attention = column[rows]
    embedded = start.bert.embeddings.word_embeddings(data.columns["input_ids"][rows])

    def forward(x):
        rest = dict(attention_mask=attention, token_type_ids=clean["token_type_ids"])
        return start.eval()(inputs_embeds=x[..., :14].transpose(1, 2), **rest).logits

    x = padded_embeddings(embedded.detach(), 16)
    s = saliency(input_gradient(forward, x, y))
    assert s[:, :14][attention == 0].abs().max() == 0  # padding is not salient
    mix = PuzzleMix(2, gamma=0, transport=None, grids=[4])
    m = mix(x, y, s, generator=batch_generator(0, 0))
    batch = {"attention_mask": attention, "token_type_ids": clean["token_type_ids"]}
    wanted, targets = mix_text(embedded, batch, y, m, 2)
    assert torch.equal(shown["inputs_embeds"], wanted["inputs_embeds"]) and torch.equal(seen.targets[0], targets)
    assert torch.equal(shown["attention_mask"], wanted["attention_mask"])
    assert not torch.equal(shown["attention_mask"], attention)
    # the embeddings learn, through the mix
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, start.bert.embeddings.word_embeddings.weight)


def test_shown_text_is_attended_text_and_labels_count_it():
    embedded = torch.arange(1.0, 17).view(2, 8, 1)
    attention = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
    partner, mask = torch.tensor([1, 0]), torch.tensor([[1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0, 0, 0, 0]])
    plan = CutMix(2)(torch.zeros(2, 1, 8), torch.tensor([0, 1]), partner=partner, lam=0.5)
    plan = type(plan)(plan.inputs, plan.targets, mask, partner)
    kinds = torch.stack([torch.zeros(8), torch.ones(8)]).long()
    batch = {"attention_mask": attention, "token_type_ids": kinds}
    out, targets = mix_text(embedded, batch, torch.tensor([0, 1]), plan, 2)
    # tokens 0, 1 of the first; 2 of the second, whose 3 is padding; halves of 4, 5, where the second has padding
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert out["inputs_embeds"][0, [0, 1, 2, 4, 5], 0].tolist() == [1, 2, 11, 5, 6]
    assert out["inputs_embeds"][1, :6, 0].tolist() == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(targets, torch.tensor([[3 / 4, 1 / 4], [1.0, 0.0]]))
    assert out["token_type_ids"][0, :3].tolist() == [0, 0, 1] and out["token_type_ids"][1, :6].tolist() == [0] * 6

    # a mask that shows padding alone shows the first text
    plan = type(plan)(plan.inputs, plan.targets, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1.0]] * 2), partner)
    batch["attention_mask"] = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]])
    out, targets = mix_text(embedded, batch, torch.tensor([0, 1]), plan, 2)
    assert out["attention_mask"][1].tolist() == batch["attention_mask"][1].tolist()
    assert targets[1].tolist() == [0, 1] and torch.equal(out["inputs_embeds"][1, :3], embedded[1, :3])
    assert padded_length(14, (2, 4, 8)) == padded_length(16, (2, 4, 8)) == 16


def gpt2() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=14, n_embd=16, n_layer=1, n_head=2, num_labels=2, pad_token_id=0)
    return GPT2ForSequenceClassification(config)


def test_text_models_that_need_the_tokens_are_refused_at_the_first_batch(tmp_path):
    data = sentences()
    del data.columns["token_type_ids"]
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification reads more from input_ids"):
        train(tmp_path, gpt2(), data)


@pytest.mark.parametrize(
    "model, settings, more, message",
    [
        (tiny_vit, {"betta": 1}, {}, r"unknown settings \['betta'\]"),
        (tiny_vit, {"beta": -1}, {}, "beta=-1"),
        (tiny_vit, {"prob": 2}, {}, "prob=2"),
        (tiny_vit, {"log_every": -1}, {}, "log_every=-1"),
        (tiny_vit, {"loss_fn": F.multi_margin_loss}, {}, "does not take soft targets"),
        (tiny_vit, {}, {"compute_loss_func": print}, "compute_loss_func does not see soft targets"),
        (lambda: tiny_vit(num_labels=1), {}, {}, "num_labels=1"),
        (lambda: tiny_vit(problem_type="multi_label_classification"), {}, {}, "single-label classifier"),
        (bert, {"transport": "exact"}, {}, "transport=exact does not go with text"),
        (bert, {"gamma": 0.5}, {}, "gamma=0.5 does not go with text"),
        (bert, {"grids": [(2, 2)]}, {}, "whole numbers for text"),
        (bert, {"augment": "augmix"}, {}, "augment='augmix' is for images, and the model reads input_ids"),
        (tiny_vit, {"augment": "augmix", "input_key": "input_values"}, {}, "and the model reads input_values"),
        (tiny_vit, {"augment": "blur"}, {}, "augment='blur' must be one of 'augmix', None"),
    ],
)
def test_refusals_when_the_trainer_is_made(tmp_path, model, settings, more, message):
    with pytest.raises(ValueError, match=message):
        mixup_trainer("puzzle")(model(), arguments(tmp_path), train_dataset=Images(), mixup=settings, **more)


def test_refusals_of_text_in_comixup_missing_inputs_and_other_methods(tmp_path):
    with pytest.raises(ValueError, match="Co-Mixup does not mix text"):
        mixup_trainer("comixup")(bert(), arguments(tmp_path), train_dataset=sentences())
    with pytest.raises(ValueError, match="no tensor 'input_values'"):
        train(tmp_path, tiny_vit(), Images(), mixup={"input_key": "input_values"})
    with pytest.raises(ValueError, match="no 'labels'"):
        train(tmp_path, tiny_vit(), [{"pixel_values": torch.rand(3, 16, 16)}] * 8)
    with pytest.raises(ValueError, match="method='mixup' must be one of 'puzzle', 'comixup'"):
        mixup_trainer("mixup")


def test_weights_of_samples_are_refused_and_corrected_labels_are_mixed(tmp_path):
    rows = CleanableDataset(Images())
    for action in ("drop", "reweight"):
        cleaning = LabelCleaningCallback(tmp_path / "cleaning", action=action, start=1)
        with pytest.raises(ValueError, match=f"LabelCleaningCallback has action='{action}': a mixed input"):
            train(tmp_path, tiny_vit(), rows, callbacks=[cleaning])
    rows.change(labels=torch.zeros(16, dtype=torch.long))
    cleaning = LabelCleaningCallback(tmp_path / "cleaning", epochs=[2], action="relabel", start=2)
    _, seen = train(tmp_path, tiny_vit(), rows, callbacks=[cleaning], remove_unused_columns=False)
    assert all(torch.equal(t[:, 0], torch.ones(8)) for t in seen.targets)


def test_mixins_stand_before_any_trainer():
    class Mine(Trainer):
        pass

    assert mixup_trainer("puzzle", Mine).__mro__[1:4][0] is PuzzleMixTrainerMixin
    assert issubclass(mixup_trainer("comixup", Mine), CoMixupTrainerMixin) and issubclass(
        mixup_trainer("puzzle"), Trainer
    )
