"""Features of a frozen trunk: computed once, kept in a file, and trained on instead of images."""
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import create_eval_loader, create_train_loader
from ..data.augment import AugmentationConfig
from ..data.sampler import EpochSampler
from ..errors import InputError
from ..models import Shike
from ..options import options
from .config import RunConfig
from .signals import StopFlag

_logger = logging.getLogger(__name__)

LARGEST = torch.finfo(torch.float16).max  # Larger features are clamped to this.
READ_AT_ONCE = 4096  # Images whose features are in memory at a time.


class FeatureLoader:
    """Batches of pooled features [B, F] and labels [B]. It draws one of V views of each image from [N, V, F]."""

    def __init__(self, features: np.ndarray, targets: Any, batch_size: int, device: torch.device):
        self.features = torch.from_numpy(features)
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.batch_size = batch_size
        self.device = device
        self.sampler = EpochSampler(len(self.targets), batch_size)

    def __len__(self) -> int:
        return self.sampler.num_batches

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        order, generator = self.sampler.draw()
        views = torch.randint(self.features.shape[1], order.shape, generator=generator)
        for rows, chosen in zip(order.split(self.batch_size), views.split(self.batch_size)):
            yield self.features[rows, chosen].to(self.device, torch.float32), self.targets[rows].to(self.device)


def _digest(model: Shike, data: Any, config: RunConfig, data_config: Dict[str, Any]) -> str:
    """Digest of everything that the features depend on: the trunk, the images and their preprocessing."""
    augmentation = {name: getattr(config, name) for name in options(AugmentationConfig)}
    source = os.path.abspath(data.source.root), type(data.source).__name__, data.decoder
    digest = hashlib.sha256(repr((source, data_config, config.cache_features, config.seed, augmentation)).encode())
    for part in (model.stem, model.stages):
        for value in part.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
    for values in (data.targets, data.rows, *([] if data.images is None else [data.images])):
        digest.update(np.ascontiguousarray(values).tobytes())
    for row in data.rows.tolist():
        digest.update(data.source.stamp(row).encode('utf-8', 'surrogateescape') + b'\n')
    return digest.hexdigest()


def _write_views(
        features: np.ndarray, model: Shike, data: Any, config: RunConfig, data_config: Dict[str, Any],
        device: torch.device, stop: StopFlag) -> None:
    """Fill the features [N, V, F]: view 0 is the plain image, view 1 its mirror image, and the others are augmented."""
    batch_size, num_views = config.validation_batch_size or config.batch_size, features.shape[1]
    plain = create_eval_loader(data, data_config, batch_size, device, config.workers, config.device_data)
    total = len(plain) * (1 + max(num_views - 2, 0))
    with tqdm(total=total, desc='Features', unit=' batches', leave=False, disable=None) as progress:
        for view in (0, *range(2, num_views)):
            loader: Any = plain
            order, row = np.arange(len(features)), 0
            if view:
                loader = create_train_loader(
                    data, data_config, config, config, device, config.workers, every_image=True)
                loader.sampler.seed = config.seed * num_views + view
                order = loader.sampler.draw()[0].numpy()
            for images, _ in loader:
                stop.check()
                batches = (images,) if view else (images, images.flip(3))[:num_views]
                for i, batch in enumerate(batches, view):
                    pooled = model.pool_levels(batch).clamp(-LARGEST, LARGEST)
                    features[order[row:row + len(batch)], i] = pooled.cpu().numpy()
                row += len(images)
                progress.update()


def statistics(features: np.ndarray, rows: np.ndarray) -> Tuple[Tensor, Tensor]:
    """Mean and variance [F] in float64 of features [N, V, F], over all views of the images at `rows`."""
    sums = np.zeros((2, features.shape[2]))
    for some in np.array_split(rows, -(-len(rows) // READ_AT_ONCE)):
        values = features[some].astype(np.float64)
        sums += values.sum((0, 1)), np.square(values).sum((0, 1))
    mean, square = torch.from_numpy(sums / (len(rows) * features.shape[1]))
    return mean, (square - mean ** 2).clamp_min(0)


def standardise(model: Shike, features: np.ndarray) -> None:
    """Set the BatchNorm statistics of the experts to those of the features [N, V, F] of all images."""
    moments = [one.split(model.level_widths) for one in statistics(features, np.arange(len(features)))]
    experts: Any = model.experts
    for expert in experts:
        for own, levels in zip((expert.norm.running_mean, expert.norm.running_var), moments):
            own.copy_(torch.cat([levels[level - 1] for level in expert.levels]))


@torch.inference_mode()
def level_batches(model: Shike, loader: Any, stop: StopFlag) -> List[Tuple[Tensor, Tensor]]:
    """Batches of pooled features [B, F] and labels [B] in float32, for the evaluations of a frozen trunk."""
    model.eval()
    batches = []
    for images, target in loader:
        stop.check()
        if len(target):
            batches.append((model.pool_levels(images.contiguous(memory_format=torch.channels_last)), target))
    return batches


@torch.no_grad()
def cached_features(
        folder: Path, model: Shike, data: Any, config: RunConfig, data_config: Dict[str, Any], device: torch.device,
        stop: StopFlag) -> np.ndarray:
    """Pooled features [N, V, F] of the training images in float16. Runs with equal trunk and views share a file."""
    shape = len(data), config.cache_features or 1, sum(model.level_widths)
    path = folder / f'features-{_digest(model, data, config, data_config)[:16]}.npy'
    if not path.exists():
        _logger.info(
            f'Features: {shape[1]} views of {shape[0]} images take {np.prod(shape) * 2 / 1e9:.2f} GB in {path}.')
        unfinished = path.with_suffix(f'.{os.getpid()}.tmp')
        try:
            features = np.lib.format.open_memmap(unfinished, 'w+', np.float16, shape)
            model.eval()
            _write_views(features, model, data, config, data_config, device, stop)
            features.flush()
            unfinished.rename(path)
        except OSError as error:
            raise InputError(
                f"'{path}' cannot be written ({error.strerror}): free some space, or keep fewer views.") from error
        finally:
            unfinished.unlink(missing_ok=True)
    return np.load(path, mmap_mode='c')
