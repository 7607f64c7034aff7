"""Puzzle Mix and Co-Mixup in the transformers ``Trainer``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataopt.core.arguments import check_choice
from dataopt.core.artifacts import write_whole
from dataopt.core.mixup import CoMixup, PuzzleMix
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..heads import logits_of
from ..label_cleaning import LabelCleaner
from ..mixing import Means, MixedBatch, Mixing, check_soft_loss, log_picture, picture, weights_error
from ..snapshots import undisturbed
from .mixup_inputs import (
    TEXT,
    Logits,
    as_signal,
    check_reads_embeddings,
    find_input,
    mix_text,
    padded_embeddings,
    padded_length,
    signal_mask,
    token_embeddings,
)

_logger = logging.getLogger(__name__)
_FILE = "mixup.json"  # in each checkpoint

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class MixupTrainerMixin(_Base):
    """What both mixins do.

    Args:
        mixup: settings, by the names of the method's class (``num_classes`` comes from the model) and of
            :class:`Mixing`, and:
            ``input_key``, what is mixed; the model's ``main_input_name`` otherwise.
            ``loss_fn``, (logits, targets (B, K)) to a mean; cross-entropy otherwise.
            ``log_every``, steps between pictures of mixed examples for TensorBoard; 500, 0 never.
        *args: of the ``Trainer``.
        **kwargs: of the ``Trainer``.

    Raises:
        ValueError: a setting that is unknown or out of range, a model that is no single-label classifier, FSDP,
            DeepSpeed's ZeRO-3, ``compute_loss_func``, a loss that cannot take soft targets; at the start of training,
            label cleaning that weighs samples; at the first batch, a missing input, or text for a model that cannot
            start from embeddings.
    """

    loss_is_scaled_for_ga = False  # a mean over the batch, which the Trainer divides by the steps of accumulation
    _method: type[PuzzleMix] | type[CoMixup]

    def __init__(self, *args: Any, mixup: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the same to transformers 5.17
        model: Any = self.model
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "num_labels"):
            raise ValueError(f"{type(model).__name__} has no config.num_labels; give a classifier of transformers")
        problem = getattr(config, "problem_type", None)
        if config.num_labels < 2 or problem not in (None, "single_label_classification"):
            raise ValueError(
                f"the model has num_labels={config.num_labels} and problem_type={problem!r}; mixing labels needs a "
                "single-label classifier of two classes or more"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func does not see soft targets; give the loss as mixup={'loss_fn': ...}")
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        zero_3 = plugin is not None and plugin.zero_stage == 3
        if zero_3 or self.is_fsdp_enabled or self.args.fsdp:
            raise ValueError(
                f"{'DeepSpeed ZeRO-3' if zero_3 else 'FSDP'} splits the model over processes, and the saliency needs "
                "it whole; train with DDP" + (" or ZeRO-2" if zero_3 else "")
            )
        given = dict(mixup or {})
        self._mixup_key: str = given.pop("input_key", None) or model.main_input_name
        self._mixup_loss = given.pop("loss_fn", F.cross_entropy)
        self._mixup_log_every = given.pop("log_every", 500)
        if self._mixup_log_every < 0:
            raise ValueError(f"log_every={self._mixup_log_every} must be at least 0, which logs no pictures")
        check_soft_loss(self._mixup_loss, config.num_labels)
        self.mixing = build_mixing(self._method, config.num_labels, self._mixup_key, given)
        self._mixup_means = Means()
        self._mixup_pictured = -1  # the step of the last picture
        self._mixup_checked = self._mixup_key != TEXT
        self.add_callback(_Checkpoint(self.mixing))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss on the mixed batch in training; the Trainer's own in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"the batch holds {sorted(inputs)} and no 'labels' to mix; name the column of class ids so"
            )
        bare: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        find_input(inputs, self._mixup_key)
        # the model brings its own autocast; this one says that float16 gradients want scaling
        with self.accelerator.autocast():
            if not self._mixup_checked:
                pad = getattr(bare.config, "pad_token_id", None)
                with undisturbed(bare):
                    check_reads_embeddings(bare, inputs, pad)
                self._mixup_checked = True
            mix = self._mix_tokens if self._mixup_key == TEXT else self._mix_signal
            inputs, batch = mix(bare, inputs, labels)
        self._mixup_means.add(batch.statistics())
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor
        targets = batch.targets * (1 - smoothing) + smoothing / batch.targets.shape[1]
        loss = self._mixup_loss(logits_of(outputs).float(), targets)
        if batch.clean_loss is not None:
            loss = loss + self.mixing.clean_weight * batch.clean_loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer does, with the mixing statistics since the last training log as ``mixup_...``."""
        if "loss" in logs:
            logs = {**logs, **{f"mixup_{name}": value for name, value in self._mixup_means.take().items()}}
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does; a resumed run goes on with the draws of mixing that it would have made."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LabelCleaner) and callback.action in ("drop", "reweight"):
                raise weights_error(f"{type(callback).__name__} has action={callback.action!r}")
        found: Any = resume_from_checkpoint
        if found is True:
            found = get_last_checkpoint(str(self.args.output_dir))
        if found and (Path(found) / _FILE).exists():
            restore(self.mixing, Path(found) / _FILE)
        elif found:
            _logger.warning("The checkpoint %s was written without mixing: its draws start from step 0", found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _mixup_epoch(self) -> int:
        return math.floor((self.state.epoch or 0) + 1e-9)

    def _mix_signal(self, bare: nn.Module, inputs: dict[str, Any], y: Tensor) -> tuple[dict[str, Any], MixedBatch]:
        key = self._mixup_key
        flat = inputs[key].ndim < 4
        rest = {name: value for name, value in inputs.items() if name != key}

        def back(x: Tensor) -> Tensor:
            return x.squeeze(1) if flat else x

        x = as_signal(inputs[key])
        batch = self.mixing(Logits(bare, key, rest, back), x, y, self._mixup_epoch)
        if batch.mixed is not None:
            mask = rest.get("attention_mask")
            if mask is not None:
                rest["attention_mask"] = signal_mask(mask, batch.mixed)
            self._log_picture(x, batch)
        return {**rest, key: back(batch.inputs)}, batch

    def _mix_tokens(self, bare: nn.Module, inputs: dict[str, Any], y: Tensor) -> tuple[dict[str, Any], MixedBatch]:
        mix: Any = self.mixing.mix
        ids = inputs[TEXT]
        rest = {name: value for name, value in inputs.items() if name != TEXT}
        embedded = token_embeddings(bare)(ids)

        def back(x: Tensor) -> Tensor:
            return x[..., : ids.shape[1]].transpose(1, 2)

        x = padded_embeddings(embedded.detach(), padded_length(ids.shape[1], mix.grids))
        batch = self.mixing(Logits(bare, "inputs_embeds", rest, back), x, y, self._mixup_epoch)
        if batch.mixed is None:
            return inputs, batch
        mixed: Any = batch.mixed
        shown, targets = mix_text(embedded, inputs, y, mixed, mix.num_classes)
        return {**rest, **shown}, dataclasses.replace(batch, inputs=shown["inputs_embeds"], targets=targets)

    def _log_picture(self, x: Tensor, batch: MixedBatch) -> None:
        step = self.state.global_step
        due = self._mixup_log_every and step % self._mixup_log_every == 0 and step != self._mixup_pictured
        writers = [w for c in self.callback_handler.callbacks if (w := getattr(c, "tb_writer", None)) is not None]
        if due and writers and batch.mixed is not None:
            self._mixup_pictured = step
            image = picture(x, batch.mixed)
            for writer in writers:
                log_picture(writer, "mixup/examples", image, step)


class PuzzleMixTrainerMixin(MixupTrainerMixin):
    """Puzzle Mix in a ``Trainer``: pairs of inputs, mixed where the model looks (thesis chapter 3).

    For classifiers of images, sound (samples or spectrograms) and text. Training batches are mixed and the loss is the
    mixin's; evaluation is the Trainer's. ::

        class PuzzleTrainer(PuzzleMixTrainerMixin, Trainer): ...

        PuzzleTrainer(model, args, train_dataset=train, mixup={"beta": 1.2, "mean": MEAN, "std": STD})

    Text is mixed along the sequence, as embeddings, without transport. ``gamma`` compares pixels; it is 0 for sound and
    text unless given. See :class:`MixupTrainerMixin` for the arguments, and :class:`PuzzleMix`.
    """

    _method = PuzzleMix


class CoMixupTrainerMixin(MixupTrainerMixin):
    """Co-Mixup in a ``Trainer``: whole batches of images or sound, mixed jointly (thesis chapter 4).

    Used as :class:`PuzzleMixTrainerMixin`; text is refused. See :class:`MixupTrainerMixin`, and :class:`CoMixup`.
    """

    _method = CoMixup


def mixup_trainer(method: str = "puzzle", trainer: type[Trainer] = Trainer) -> type[Trainer]:
    """A Trainer class that mixes.

    Args:
        method: ``"puzzle"`` or ``"comixup"``.
        trainer: the class to start from.

    Returns:
        A subclass, with the keyword ``mixup`` of :class:`MixupTrainerMixin`.

    Raises:
        ValueError: another method.

    Examples:
        >>> from dataopt.integrations.hf import mixup_trainer
        >>> mixup_trainer("comixup").__name__
        'CoMixupTrainer'
    """
    mixins: dict[str, type[MixupTrainerMixin]] = {"puzzle": PuzzleMixTrainerMixin, "comixup": CoMixupTrainerMixin}
    check_choice(mixins, method=method)
    mixin = mixins[method]
    return type(mixin.__name__.replace("TrainerMixin", trainer.__name__), (mixin, trainer), {})


def build_mixing(
    method: type[PuzzleMix] | type[CoMixup], num_classes: int, input_key: str, settings: dict[str, Any]
) -> Mixing:
    """Sort the settings, with what the kind of input needs.

    Raises:
        ValueError: an unknown setting, or one that does not go with text.
    """
    core, own = (list(inspect.signature(made).parameters)[1:] for made in (method, Mixing))
    unknown = sorted(set(settings) - set(core) - set(own))
    if unknown:
        raise ValueError(f"mixup has the unknown settings {unknown}; there are {[*dict.fromkeys(core + own)]}")
    if settings.get("augment") is not None and input_key != "pixel_values":
        raise ValueError(
            f"augment={settings['augment']!r} is for images, and the model reads {input_key}; leave it out"
        )
    if method is PuzzleMix and input_key != "pixel_values":
        settings = {"gamma": 0.0, **settings}
    if input_key == TEXT:
        if method is not PuzzleMix:
            raise ValueError("Co-Mixup does not mix text; use PuzzleMixTrainerMixin")
        settings = {"transport": None, **settings}
        wanted = dict(transport=None, gamma=0.0, adversarial=None, clean_weight=0.0, saliency_resolution=1.0)
        for name, value in wanted.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name}={settings[name]} does not go with text; leave it at {value}")
        grids = settings.get("grids", ())
        if not isinstance(grids, list | tuple) or not all(isinstance(grid, int) for grid in grids):
            raise ValueError(f"grids={settings['grids']} must be whole numbers for text, parts of a sequence")
    mix = method(num_classes, **{name: value for name, value in settings.items() if name in core})
    return Mixing(mix, **{name: value for name, value in settings.items() if name in own})


def restore(mixing: Mixing, path: Path) -> None:
    """Go on from what a checkpoint holds about mixing.

    Raises:
        ValueError: a file that is damaged.
    """
    try:
        mixing.load_state_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e}); resume from another checkpoint") from e


class _Checkpoint(TrainerCallback):
    """Writes the place in the sequence of draws beside each checkpoint's weights."""

    def __init__(self, mixing: Mixing):
        self.mixing = mixing

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            if folder.is_dir():  # a hyperparameter search has them in folders of its runs
                write_whole(folder / _FILE, json.dumps(self.mixing.state_dict()))
