"""The images of an epoch, the share of each process, and the seed of each image."""
import random
from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from ..distributed import rank, world_size


class EpochSampler(Sampler[Tuple[int, int]]):
    """Samples this process's share of a training set in random order, each image with its own seed.

    Each process takes the same number of whole batches, a multiple of `multiple`. No image is taken twice. The images
    of a step do not depend on the number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, multiple: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_batches = num_images // (batch_size * world_size() * multiple) * multiple
        self.seed: Optional[int] = None
        self.share = self._share(0, self.num_batches)

    def _share(self, first: int, last: int) -> slice:
        span = self.batch_size * world_size()
        return slice(first * span + rank(), last * span, world_size())

    def set_epoch(self, seed: int, first: int, last: int) -> None:
        """Let the next pass take the batches from `first` to before `last`, in the order that this seed makes."""
        self.seed = seed
        self.share = self._share(first, last)

    def take_all(self) -> None:
        """Let all passes take every image once. The batches of the processes may then differ in number by one."""
        self.share = slice(rank(), self.num_images, world_size())
        self.num_batches = -(-len(range(self.num_images)[self.share]) // self.batch_size)

    def draw(self) -> Tuple[Tensor, torch.Generator]:
        """Indices of the next pass, and the generator that drew them. Without `set_epoch` each pass has a new order."""
        seed = int(torch.randint(2 ** 62, ())) if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_images, generator=generator)[self.share], generator

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        order, generator = self.draw()
        seeds = torch.randint(2 ** 32, (self.num_images,), generator=generator)[self.share]
        return zip(order.tolist(), seeds.tolist())

    def __len__(self) -> int:
        """Images of a whole epoch."""
        return self.num_batches * self.batch_size


class SeededDataset(Dataset):
    """A data set whose items depend only on their index and seed, not on the items that a worker made before.

    Random draws of `collate`, as for Mixup, continue from the generators' state after the last item. Without workers
    the training process loads images. Its generators are then restored, so that its dropout does not change.
    """

    def __init__(self, dataset: Any, collate: Callable[[List[Any]], Any]):
        self.dataset = dataset
        self._collate = collate
        self._states: Any = None  # Random states of the training process before a batch.

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, seed = key
        if self._states is None and get_worker_info() is None:
            self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as decoding a small image
        return self.dataset[index]

    def collate(self, items: List[Any]) -> Any:
        batch = self._collate(items)
        if self._states is not None:
            random.setstate(self._states[0])
            np.random.set_state(self._states[1])
            torch.set_rng_state(self._states[2])
            self._states = None
        return batch
