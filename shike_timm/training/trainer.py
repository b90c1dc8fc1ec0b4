"""The training loop: epochs of each phase, with logs, a summary, checkpoints and orderly stops."""
import argparse
import copy
import json
import logging
import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from timm.optim.lookahead import Lookahead
from timm.task import DistillationTeacher
from timm.utils import NativeScaler, distribute_bn, update_summary
from timm.utils.summary import trim_summary
from torch import Tensor, nn

from ..checkpoints import StageSaver, load_weights, saved_args
from ..data import TrainingData, create_train_loader, set_mixup, set_stream_epoch
from ..data.sampler import EpochSampler
from ..distributed import Vote, gather, on_primary, over_processes, rank, world_size
from ..files import named_errors, write_text
from ..metrics import METRICS, evaluate, fit_temperature, print_results
from ..models import Shike
from ..models.create import create_model
from ..models.lora import merge_lora
from ..pretrained.folder import export_model
from .class_means import begin_at_class_means
from .config import RunConfig
from .features import FeatureLoader, cached_features, level_batches, standardise
from .folder import check_folder, claim_folder, read_metrics, save_args
from .methods import create_task
from .optimizer import create_optimizer, create_schedule, resolve_autocast
from .phases import Phase
from .progress import Progress, read_summary, show_progress
from .resume import warn_of_changes
from .search import search
from .signals import Interrupted, StopFlag, stop_signals
from .step import Done, NonFiniteError, seed_all, train_step
from .tasks import TERMS
from .trackers import tracking

CHECK_INTERVAL = 50  # Steps between two checks of the loss. Each check waits for the device.

_logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Trains a model through the phases of a run."""

    config: RunConfig
    phases: Sequence[Phase]
    data: TrainingData
    data_config: Dict[str, Any]  # The preprocessing, from `timm.data.resolve_data_config`.
    model: Shike
    train_loader: Any
    eval_loader: Any
    device: torch.device
    teacher: Optional[DistillationTeacher] = None  # Its logits are distilled into every expert.
    before: Dict[str, Any] = field(default_factory=dict)  # Metrics of the model at the start, under 'before'.

    def __post_init__(self) -> None:
        self.autocast = resolve_autocast(self.config, self.device)
        self.loss_scaler = NativeScaler(self.device.type) if self.autocast == torch.float16 else None
        self.folder = Path(self.config.output, self.config.experiment)
        self.stop = StopFlag()
        self.vote = Vote()
        self.progress: Progress
        self.track: Callable[[Path], None] = lambda summary: None

    def train(self, resumed: bool = False, checkpoint: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
        """Train all phases, the first one from `checkpoint` if given. Write and return the metrics by phase name."""
        if checkpoint is not None:
            load_weights(self.model, checkpoint['state_dict'], self.folder)
            warn_of_changes(self.data, saved_args(checkpoint).get('class_counts') or ())
        self.start(self.phases[0])  # Wrong options raise errors here, before the folder is made.
        on_primary(check_folder, self.folder, resumed)
        path = self.folder / 'metrics.json'
        metrics = read_metrics(self.folder) or dict(self.before)
        num_steps = sum(phase.epochs for phase in self.phases) * len(self.train_loader)
        with (stop_signals() as self.stop, tracking(self.config, self.folder) as self.track,
              show_progress(num_steps, not self.config.log_interval) as self.progress, ExitStack() as stack):
            on_primary(lambda: stack.callback(claim_folder(self.folder, self.config, resumed).release))
            # A run that is resumed later is known as a retraining by this folder.
            on_primary(partial((self.folder / self.phase.name).mkdir, exist_ok=True))
            _logger.info(self.data.describe())
            on_primary(self.data.write_split_lists, self.folder)
            if self.before:
                on_primary(write_text, path, json.dumps(metrics, indent=2) + '\n')
            with named_errors(self.folder), self._failures_explained():
                if self.config.cache_features:
                    self._use_features(fresh=checkpoint is None)
                for phase in self.phases:
                    if phase is not self.phase:
                        self.start(phase)
                    metrics[phase.name] = self._train_phase(checkpoint)
                    checkpoint = None
                    on_primary(write_text, path, json.dumps(metrics, indent=2) + '\n')
        last = metrics[self.phase.name]
        on_primary(self._write_model, last['reject']['threshold'])
        if rank() == 0:
            print_results(metrics, self.per_class, self.data.class_names, self.data.class_counts, known=True)
        self._log_change(metrics)
        _logger.info(f'Run folder: {self.folder}')
        return metrics

    def _log_change(self, metrics: Dict[str, Any]) -> None:
        """Log why top-1 is lower after stage two, if it is: the logits are now for equally frequent classes."""
        first = next(iter(metrics))  # Stage one, or the model that the run began with.
        before, after = metrics[first]['top1'], metrics[self.phase.name]['top1']
        if self.phase.is_retraining and after < before:
            self.model.set_target_prior('train')
            as_trained = self.evaluate(self.model)['top1']
            self.model.set_target_prior(None)
            _logger.info(
                f'Stage two takes all classes as equally frequent, so top1 went from {before} to {after}. If '
                'classes are as frequent as in training, use --target-prior train of shike eval, predict or export: '
                f'top1 is then {as_trained}.')

    def _use_features(self, fresh: bool) -> None:
        """Replace the images by cached features. In a fresh run with `--search`, choose the experts first."""
        data = self.data.train
        features = cached_features(
            self.folder.parent, self.model, data, self.config, self.data_config, self.device, self.stop)
        if fresh and self.config.search:
            config = replace(self.config, lr=self.phases[0].lr, lr_base=None)
            found = search(features, data, self.model.level_widths, config, self.stop)
            write_text(self.folder / 'search.json', json.dumps(found, indent=2) + '\n')
            best = {key: found[0][key] for key in ('levels', 'cosine_scale', 'lr')}
            _logger.info(
                f"Search: chosen are --levels {' '.join(best['levels'])} --cosine-scale {best['cosine_scale']:g} --lr "
                f"{best['lr']:g}.")
            self.config = replace(config, **best, num_experts=len(best['levels']), search=False)
            save_args(self.folder, self.config)
            self.phases = [replace(phase, lr=best['lr']) for phase in self.phases]
            self.model = create_model(
                self.config, self.data.num_classes, self.config.channels, True, self.config.image_size)
            self.model.to(self.device)
            self.start(self.phases[0])
        if fresh:
            standardise(self.model, features)
        self.eval_loader = level_batches(self.model, self.eval_loader, self.stop)
        self.train_loader = FeatureLoader(features, data.targets, self.config.batch_size, self.device)

    def start(self, phase: Phase) -> None:
        """Create the task, the optimizer and the schedule of a phase."""
        self.phase, config = phase, self.config
        if phase.is_retraining:
            seed_all(config.seed, phase.number, -1)  # New classifiers must not depend on earlier random numbers.
        self.task = create_task(
            config, self.model, self.data.class_counts, self.device, phase.is_retraining, teacher=self.teacher,
            mean=self.data_config['mean'], std=self.data_config['std'])
        if config.channels_last:
            self.task.to(memory_format=torch.channels_last)
        if config.model_ema:
            self.task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        self.optimizer = create_optimizer(config, phase.lr, self.model)
        self.scheduler = create_schedule(self.optimizer, config, phase)

    def step(self, images: Tensor, target: Tensor, update: bool = True, num_updates: Optional[int] = None) -> Any:
        """Train on one batch, as `train_step`."""
        return train_step(
            self.task, images, target, self.optimizer, self.config, self.autocast, self.loss_scaler, update,
            num_updates)

    def _train_phase(self, checkpoint: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        """Train the phase from its start or from a checkpoint, and return its metrics. `model` then has the weights."""
        config, phase = self.config, self.phase
        first_epoch, done = (0, Done()) if checkpoint is None else self._restore(checkpoint)
        if checkpoint is None and phase.class_means:
            self._begin_at_class_means()
        if config.torchcompile and not phase.is_retraining:
            self.task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        images = config.batch_size * world_size() * config.grad_accum_steps
        _logger.info(
            f'{phase.title.capitalize()}: {images} images a step, learning rate {phase.lr:g}, {phase.epochs} epochs.')
        if world_size() > 1:
            devices = None if self.device.type == 'cpu' else [self.device]
            # --dist-bn combines BatchNorm statistics after each epoch, so that no step has to broadcast them.
            # Gradients are views of the buffers that are summed over processes, so that no step copies gradients.
            self.task.prepare_distributed(
                device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.model.set_training_prior(self.data.class_counts, phase.prior)
        self._create_saver(checkpoint)
        metrics = self._train_epochs(first_epoch, done)
        if config.model_ema:
            self.model.load_state_dict(self._eval_model(ema=True).state_dict())
            _logger.info(
                f"The averaged weights of {phase.title} are kept. Their top1 is {metrics['top1']}, that of the plain "
                f"weights {metrics['plain']['top1']}.")
        if config.lora and not phase.is_retraining:
            merge_lora(self.model)
        return metrics

    def _begin_at_class_means(self) -> None:
        """Start the classifiers at the class means of the features of all images, augmented as the phase augments."""
        config, start = self.config, time.perf_counter()
        if config.cache_features:
            loader = copy.copy(self.train_loader)
            loader.sampler = EpochSampler(len(self.data.train), config.batch_size)
            loader.sampler.take_all()
        else:
            loader = create_train_loader(
                self.data.train, self.data_config, config, config, self.device, config.workers, every_image=True)
        seed_all(config.seed, self.phase.number, -1)
        if self.data.train.is_stream:
            set_stream_epoch(loader, self.phase.first_row, int(torch.randint(2 ** 62, ())))
        num_images = begin_at_class_means(self.model, loader, self.stop)
        if config.model_ema:
            self._eval_model(ema=True).load_state_dict(self.model.state_dict())
        _logger.info(
            f'{self.phase.title.capitalize()}: the classifiers begin at the class means of {num_images} images, '
            f'in {time.perf_counter() - start:.1f} s.')

    def _restore(self, checkpoint: Dict[str, Any]) -> Tuple[int, Done]:
        """Load a checkpoint of the phase, and return the epoch to go on with and the part of it that is finished."""
        self.model.load_state_dict(checkpoint['state_dict'])
        if self.config.model_ema:
            self._eval_model(ema=True).load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))
        self.optimizer.load_state_dict(checkpoint['optimizer'])
        if self.loss_scaler is not None and self.loss_scaler.state_dict_key in checkpoint:
            self.loss_scaler.load_state_dict(checkpoint[self.loss_scaler.state_dict_key])
        epoch, done = checkpoint['epoch'] + 1, Done(**checkpoint['saver'].get('done', {}))
        _logger.info(f'Resuming {self.phase.title} at epoch {epoch + 1}, step {done.step}.')
        return epoch, done

    def _create_saver(self, checkpoint: Optional[Dict[str, Any]]) -> None:
        config = self.config
        folder = self.folder / self.phase.name
        on_primary(partial(folder.mkdir, exist_ok=True))
        args = argparse.Namespace(
            **vars(config), world_size=world_size(), class_counts=self.data.class_counts,
            class_names=self.data.class_names, shot_counts=self.data.shot_counts, classifier_prior=self.phase.prior,
            classifier_scale=self.model.cosine_scale)
        self.saver = StageSaver(
            folder, model=self.model, optimizer=self.optimizer, args=args, amp_scaler=self.loss_scaler, task=self.task,
            max_history=config.checkpoint_hist, decreasing=config.eval_metric in ('loss', 'ece'))
        if checkpoint is None:
            on_primary(self.saver.save_last, -1)
            return
        self.saver.load_state_dict(checkpoint['saver'])
        if getattr(checkpoint['args'], 'eval_metric', None) != config.eval_metric:
            self.saver.best_metric = None  # The saved value is of another metric.

    def _train_epochs(self, first_epoch: int, done: Done) -> Dict[str, Any]:
        """Train the remaining epochs, and return the metrics after the last epoch with the `seconds` of the phase."""
        config, phase, summary = self.config, self.phase, self.folder / 'summary.csv'
        on_primary(trim_summary, str(summary), phase.first_row + first_epoch)
        rows = read_summary(summary)
        # The summary of an older run lacks some columns.
        terms = [term for term in TERMS if not rows or f'train_{term}' in rows[0]]
        metrics = None
        self.progress.begin(self.progress.step + first_epoch * len(self.train_loader) + done.step)
        for epoch in range(first_epoch, phase.epochs):
            done, status = self.train_epoch(epoch, done)
            if isinstance(self.optimizer, Lookahead):
                _sync_lookahead(self.optimizer)
            means = {key: round(value / done.num_images, 6) for key, value in done.sums.items()}
            trained = {key: means.get(key) for key in ('loss', 'seconds', *terms)}
            trained['seconds'] = round(done.seconds, 3)
            metrics = None
            if epoch == phase.epochs - 1 or (epoch + 1) % config.val_interval == 0:
                # The evaluation may fail, so the epoch is saved before it.
                on_primary(self.saver.save_last, epoch - 1, asdict(done))
                metrics = self._evaluate(last=epoch == phase.epochs - 1)
                status += '  Eval: ' + '  '.join(
                    f'{key}: {metrics[key]}' for key in METRICS if metrics[key] is not None)
            _logger.info(f'Train: {self._where(epoch)}, {self.progress.left()} left  {status}')
            evaluated = {key: metrics[key] if metrics else None for key in METRICS}
            on_primary(update_summary, phase.first_row + epoch, trained, evaluated, str(summary), self._lr())
            on_primary(self.track, summary)
            on_primary(self.saver.save_epoch, epoch, metrics[config.eval_metric] if (
                metrics and config.eval_metric) else None)
            done = Done()
        if metrics is None:
            metrics = self._evaluate(last=True)
        own = [row for row in read_summary(summary) if int(row['epoch']) >= phase.first_row]
        return dict(metrics, seconds=round(sum(float(row['train_seconds']) for row in own), 1))

    def train_epoch(self, epoch: int, done: Done) -> Tuple[Done, str]:
        """Train the rest of an epoch, and return the finished epoch and the text of its log line.

        Random numbers are seeded again after each checkpoint, so that a run can be resumed from any checkpoint.
        """
        config, num_steps, status = self.config, len(self.train_loader), ''
        self.task.progress = epoch / self.phase.epochs
        self.scheduler.step(epoch)
        if config.mixup_off_epoch and (config.mixup or config.cutmix):
            set_mixup(self.train_loader, self.phase.first_row + epoch < config.mixup_off_epoch)
        part = (config.recovery_interval or num_steps) * config.grad_accum_steps
        while done.step < num_steps:
            self.task.train()
            end = min(done.step + part, num_steps)
            done, status = self._train_part(epoch, done, end)
            for ema in (False, True) if self.task.has_ema() else (False,):
                if world_size() > 1:
                    distribute_bn(self._eval_model(ema), world_size(), config.dist_bn == 'reduce')
            self._check_weights(epoch)
            if end < num_steps:
                # The checkpoint holds the number of the last complete epoch, and the finished steps of this epoch.
                on_primary(self.saver.save_last, epoch - 1, asdict(done))
        return done, status

    def _train_part(self, epoch: int, done: Done, end: int) -> Tuple[Done, str]:
        config, num_steps = self.config, len(self.train_loader)
        self._seed_part(epoch, done, end)
        # The number of steps stands for no bad step.
        never = torch.full((), num_steps, dtype=torch.int64, device=self.task.device)
        first_bad_step = never
        sums: Dict[str, Tensor] = {}
        num_images, images_since_log, done_now, status = 0, 0, done, ''
        start = log_start = time.perf_counter()
        for step, (images, target) in enumerate(self.train_loader, done.step):
            signum = self.vote(self.stop.signum)
            if signum:
                raise Interrupted(signum)
            last = step == end - 1
            update = last or (step + 1) % config.grad_accum_steps == 0  # A stream may end within an update.
            num_updates = (epoch * num_steps + step + 1) // config.grad_accum_steps
            result = self.step(images, target, update, num_updates)
            finite = result['loss'].detach().isfinite()
            # Loss scaling skips an update whose loss overflowed. The run ends only if the loss does not recover.
            first_bad_step = torch.where(
                finite, first_bad_step if self.loss_scaler is None else never, first_bad_step.clamp(max=step))

            batch_size = len(images)
            num_images += batch_size * world_size()
            images_since_log += batch_size * world_size()
            for key, value in result.items():
                if key != 'output':
                    sums[key] = sums.get(key, 0.) + torch.where(finite, value.detach() * batch_size, 0.)

            if last or step % (config.log_interval or CHECK_INTERVAL) == 0:
                self._check_loss(first_bad_step, epoch)
                # The sums over processes are the mean of the losses and the totals of `sums`.
                reduced = over_processes(torch.stack([result['loss'].detach() / world_size(), *sums.values()]))
                loss, *values = reduced.double().tolist()
                now = time.perf_counter()
                done_now = Done(
                    step + 1, done.num_images + num_images, done.seconds + now - start,
                    {key: done.sums.get(key, 0.) + value for key, value in zip(sums, values)})
                rates = images_since_log / (now - log_start), num_images / (now - start)
                status = self._status(loss, done_now, rates)
                if config.log_interval and self.progress.bar.disable and not last:
                    _logger.info(f'Train: {self._where(epoch)}, step {step + 1} of {num_steps}  {status}')
                log_start, images_since_log = now, 0
            self.progress.update(self._where(epoch), result['loss'].detach(), batch_size * world_size())
        return done_now, status

    def _seed_part(self, epoch: int, done: Done, end: int) -> None:
        """Seed a part of an epoch, and tell the loader the order of its images."""
        seed = self.config.seed
        seed_all(seed, self.phase.number, epoch)
        order_seed = int(torch.randint(2 ** 62, ()))
        if hasattr(self.train_loader.sampler, 'set_epoch'):  # A stream has no such sampler.
            self.train_loader.sampler.set_epoch(order_seed, done.step, end)
        else:
            set_stream_epoch(self.train_loader, self.phase.first_row + epoch, order_seed)
        part = done.step * world_size() + rank()
        if part:
            seed_all(seed, self.phase.number, epoch, part)

    def _where(self, epoch: int) -> str:
        return f'{self.phase.title}, epoch {epoch + 1} of {self.phase.epochs}'

    def _lr(self) -> float:
        """The learning rate, the highest one if layers have different rates."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def _status(self, loss: float, done: Done, rates: Tuple[float, float]) -> str:
        """Losses, images a second and learning rate, as timm's train.py logs them."""
        means = {key: value / done.num_images for key, value in done.sums.items()}
        return (
            f"Loss: {loss:#.3g} ({means.pop('loss'):#.3g})  "
            + ''.join(f'{key.upper()}: {value:#.3g}  ' for key, value in means.items())
            + f'Time: {rates[0]:>7.2f}/s ({rates[1]:>7.2f}/s)  LR: {self._lr():.3e}')

    def _check_loss(self, first_bad_step: Tensor, epoch: int) -> None:
        bad_step = int(over_processes(first_bad_step, dist.ReduceOp.MIN))
        if bad_step < len(self.train_loader):
            raise NonFiniteError(
                f'The loss is not finite at step {bad_step + 1} of {self._where(epoch)}: '
                'try a lower --lr, --clip-grad, or --amp-dtype bfloat16.')

    def _check_weights(self, epoch: int) -> None:
        tensors = [t for t in self._eval_model().state_dict().values() if t.is_floating_point()]
        if not math.isfinite(float(nn.utils.get_total_norm(tensors))):
            raise NonFiniteError(
                f'The weights are not finite after {self._where(epoch)}: try a lower --lr.')

    def _eval_model(self, ema: bool = False) -> nn.Module:
        """The model that the task evaluates, or its moving average."""
        model = self.task.get_eval_model(ema=ema)
        assert model is not None
        return model

    def evaluate(self, model: nn.Module, kept: Optional[List[Tuple[Tensor, Tensor]]] = None) -> Dict[str, Any]:
        """Metrics of a model on the evaluation data. Logits and targets are added to `kept`, if it is given."""
        metrics = evaluate(
            model, self.eval_loader, self.data.shot_counts, self.device, shots=self.config, kept=kept)
        self.per_class = metrics.pop('per_class')
        return metrics

    def _evaluate(self, last: bool = False) -> Dict[str, Any]:
        """Metrics of the model or, if averaged, of its moving average with those of the model under `plain`."""
        averaged = self.task.has_ema()
        plain = dict(plain=self.evaluate(self._eval_model())) if averaged else {}
        model = self._eval_model(ema=averaged)
        if last and self.config.calibrate:
            self._calibrate(model)
        metrics = self.evaluate(model)
        if last:  # The epoch's checkpoint, saved after this, holds both values.
            vars(self.saver.args).update(
                reject_threshold=metrics['reject']['threshold'], temperature=self.model.temperature)
        return dict(metrics, **plain)

    def _calibrate(self, model: nn.Module) -> None:
        """Fit the temperature of a model to the evaluation data of all processes."""
        kept: List[Tuple[Tensor, Tensor]] = []
        before = self.evaluate(model, kept)['ece']
        parts = gather([(logits.mean(1), targets) for logits, targets in kept])
        temperature = fit_temperature(*(torch.cat(one) for one in zip(*parts)))
        for one in (model, self.model):
            one.set_temperature(temperature)
        _logger.info(
            f'Calibration: a temperature of {temperature:g} fits the evaluation images best. Without it their '
            f'calibration error (ece) is {before} %.')

    def _write_model(self, reject_threshold: float) -> None:
        """Write the model folder and, where matplotlib is installed, the learning curves."""
        config, data = self.config, self.data
        export_model(
            self.model, self.folder / 'model', self.data_config, data.class_names, data.class_counts,
            shot_counts=data.shot_counts, reject_threshold=reject_threshold, exif=config.exif,
            pixel_range=config.pixel_range)
        if find_spec('matplotlib') is not None:
            from .curves import write_curves
            write_curves(self.folder)

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """After a failure, log how to resume the run. If a data loader worker died, say so."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if any(self.folder.glob('*/last.pth.tar')):
                _logger.error(f'The last checkpoint is kept. Go on with: shike train --resume {self.folder}')
            if self.stop.signum and not isinstance(error, Interrupted):
                raise Interrupted(self.stop.signum) from error  # The workers of a loader got the signal too.
            if isinstance(error, ConnectionError):  # The pipe from a process that loads images broke.
                raise RuntimeError(f'DataLoader worker: {error}') from error
            raise


def _sync_lookahead(optimizer: Lookahead) -> None:
    """Replace the fast weights of Lookahead by its slow weights, as Lookahead does every few updates."""
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)  # timm leaves out parameters without gradients.
    optimizer.sync_lookahead()
    optimizer.zero_grad()
