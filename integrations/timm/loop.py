"""A short training loop over timm's public parts, for where no ``train.py`` of timm's is at hand.

timm's flag names for what it supports; ``accelerate`` for precision and processes. Ends each epoch
with timm's own files: ``last.pth.tar``, ``model_best.pth.tar``, ``summary.csv``, ``args.yaml``.
"""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, evaluation_sample_limit, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import distribute_bn, random_seed, setup_default_logging, update_summary
from timm.utils.clip_grad import dispatch_clip_grad
from tqdm import tqdm

from .condensed import with_condensed
from .flags import parse
from .options import METHODS, stop, task_settings
from .saver import make_saver, trim
from .task import TASKS, MixTask

_logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Train as the command line says."""
    args = parse(argv)
    setup_default_logging()
    half = {"float16": "fp16", "bfloat16": "bf16"}[args.amp_dtype]
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=half if args.amp else "no")
    if args.device and accelerator.device.type != args.device:
        stop(f"--device {args.device} is not available here; found {accelerator.device.type}")
    if half == "fp16" and args.amp and accelerator.device.type == "cpu":  # accelerate would leave it out silently
        stop("--amp on the CPU needs --amp-dtype bfloat16; float16 runs on a GPU, or with timm's train.py")
    random_seed(args.seed, accelerator.process_index)
    saved_args = argparse.Namespace(**vars(args))

    model = create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.input_size[0] if args.input_size else args.in_chans or 3,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    args.num_classes = args.num_classes or model.num_classes
    model.to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    config = resolve_data_config(vars(args), model=model)
    train_loader, val_loader = _loaders(args, config, accelerator)
    task = _task(args, model, accelerator)
    global_batch = args.batch_size * accelerator.num_processes * args.grad_accum_steps
    if args.lr is None:  # timm's rule
        scale = global_batch / args.lr_base_size
        args.lr = args.lr_base * (scale**0.5 if any(o in args.opt.lower() for o in ("ada", "lamb")) else scale)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    if accelerator.scaler is not None:
        accelerator.scaler.state_dict_key = "amp_scaler"  # what timm's checkpoints look for
    start = 0
    if args.resume:
        start = resume_task_checkpoint(task, args.resume, optimizer, accelerator.scaler) or 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)

    folder = os.path.join(args.output, args.experiment or f"{safe_model_name(args.model)}-{config['input_size'][-1]}")
    summary = os.path.join(folder, "summary.csv")
    saver = make_saver(args, folder, saved_args, task, optimizer, accelerator) if accelerator.is_main_process else None
    if saver is not None:
        trim(summary, start)
    accelerator.wait_for_everyone()
    updates = -(-len(train_loader) // args.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=not args.val_split), updates_per_epoch=updates
    )
    if scheduler is not None and start:
        scheduler.step(start)

    for epoch in range(start, epochs):
        # per epoch, so that a resumed run shuffles and augments as the straight one would have
        random_seed(args.seed + 1000 * epoch, accelerator.process_index)
        if accelerator.num_processes > 1 and hasattr(train_loader.sampler, "set_epoch"):
            train_loader.sampler.set_epoch(epoch)
        train_metrics = train_one_epoch(epoch, task, train_loader, optimizer, scheduler, args, accelerator)
        eval_metrics = None
        if val_loader is not None:
            if accelerator.num_processes > 1:
                distribute_bn(task.trainable_module, accelerator.num_processes, True)
            for ema in (False, True) if task.has_ema() else (False,):
                eval_metrics = validate(task, val_loader, args, accelerator, ema)
        metric = eval_metrics["top1"] if eval_metrics else train_metrics["loss"]
        if saver is not None:
            lr = sum(g["lr"] for g in optimizer.param_groups) / len(optimizer.param_groups)
            update_summary(epoch, train_metrics, eval_metrics, summary, lr=lr)
            saver.save_checkpoint(epoch, metric)
            shown = "".join(f", validation {k} {v:.4g}" for k, v in (eval_metrics or {}).items())
            _logger.info("Epoch %d: loss %.4g%s", epoch, train_metrics["loss"], shown)
        if scheduler is not None:
            scheduler.step(epoch + 1, metric)
    accelerator.end_training()


def train_one_epoch(
    epoch: int, task: Any, loader: Any, optimizer: Any, scheduler: Any, args: argparse.Namespace, accelerator: Any
) -> dict[str, float]:
    """One epoch; mean loss over this process' batches."""
    task.trainable_module.train()
    if isinstance(task, MixTask):
        task.set_epoch(epoch)
    elif args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        loader.mixup_enabled = False
    last, accum = len(loader) - 1, args.grad_accum_steps
    updates_done = epoch * -(-len(loader) // accum)
    total, seen = torch.zeros((), device=accelerator.device), 0
    disable = None if accelerator.is_main_process else True
    bar = tqdm(loader, f"epoch {epoch}", unit="batch", disable=disable, leave=False)
    for i, (x, y) in enumerate(bar):
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        update = (i + 1) % accum == 0 or i == last
        group = accum if i < len(loader) - len(loader) % accum else len(loader) % accum  # the last may be short
        with nullcontext() if update else accelerator.no_sync(task.trainable_module):
            with accelerator.autocast():
                loss = task(x, y)["loss"]
            accelerator.backward(loss / group)
        total += loss.detach() * len(x)
        seen += len(x)
        if update:
            if args.clip_grad is not None:
                accelerator.unscale_gradients()
                parameters = task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
                dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
            optimizer.step()
            optimizer.zero_grad()
            updates_done += 1
            task.update_ema(step=updates_done)
            if scheduler is not None:
                scheduler.step_update(updates_done)
        if i % args.log_interval == 0:
            bar.set_postfix(loss=f"{total.item() / seen:.3g}")
    return {"loss": accelerator.reduce(total / seen, "mean").item()}


@torch.no_grad()
def validate(task: Any, loader: Any, args: argparse.Namespace, accelerator: Any, ema: bool) -> dict[str, float]:
    """Loss and accuracy on the validation split, over all processes."""
    model = task.get_eval_model(ema=ema).eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for x, y in loader:
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            evaluator.update(model(x), y)
    return evaluator.compute(distributed=accelerator.num_processes > 1)


def _loaders(args: argparse.Namespace, config: dict[str, Any], accelerator: Any) -> tuple[Any, Any]:
    mixup = None if args.mixup in METHODS else float(args.mixup)  # None: in the task; a YAML file may hold an int
    collate = None
    if mixup is not None and (mixup > 0 or args.cutmix > 0):
        collate = FastCollateMixup(
            mixup_alpha=mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.num_classes,
        )
    create = with_condensed(create_dataset, args)
    loaders: list[Any] = []
    for training, split in ((True, args.train_split), (False, args.val_split)):
        if not split:
            loaders.append(None)
            continue
        dataset = create(
            args.dataset, root=args.data_dir, split=split, is_training=training, class_map=args.class_map,
            download=args.dataset_download, batch_size=args.batch_size, seed=args.seed, input_key=args.input_key,
            target_key=args.target_key, input_img_mode="RGB" if config["input_size"][0] == 3 else "L",
        )  # fmt: skip
        if training and len(dataset) < args.batch_size * accelerator.num_processes:
            stop(f"--batch-size {args.batch_size} on {accelerator.num_processes} process(es) is more than the "
                 f"{len(dataset)} training images; give a smaller one")  # fmt: skip
        augment = dict(
            no_aug=args.no_aug, train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio,
            hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter, auto_augment=args.aa,
            re_prob=args.reprob, re_mode="pixel", collate_fn=collate,
            interpolation=config["interpolation"] if args.no_aug else args.train_interpolation,
        ) if training else dict(interpolation=config["interpolation"], crop_pct=config["crop_pct"])  # fmt: skip
        loaders.append(create_loader(
            dataset, config["input_size"], (not training and args.validation_batch_size) or args.batch_size,
            is_training=training, mean=config["mean"], std=config["std"], num_workers=args.workers,
            distributed=accelerator.num_processes > 1, pin_memory=args.pin_mem, device=accelerator.device,
            persistent_workers=not training, **augment,  # new ones see each epoch's seed and whether mixup is off
        ))  # fmt: skip
    return loaders[0], loaders[1]


def _task(args: argparse.Namespace, model: Any, accelerator: Any) -> ClassificationTask:
    loss = {"loss_type": "bce" if args.bce_loss else "ce", "smoothing": args.smoothing}
    common = dict(device=accelerator.device, verbose=accelerator.is_main_process)
    if args.mixup in METHODS:
        settings = task_settings(args, model, args.cutmix, args.mixup)
        return TASKS[args.mixup](model, criterion_kwargs=loss, **settings, **common)
    soft = args.mixup > 0 or args.cutmix > 0
    return ClassificationTask(model, criterion_kwargs={**loss, "soft_targets": soft}, **common)
