"""What each process takes of an epoch, and images that come out the same whichever process or worker makes them."""
import random
from typing import Any, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..distributed import rank, world_size

__all__ = ['EpochSampler', 'SeededDataset']


class EpochSampler(Sampler[Tuple[int, int]]):
    """This process's share of a training set in a new order: whole batches, as many in each process, no image twice.

    A step's images are the same however many processes share them. Each comes with a seed of its own.

    Args:
        num_images: Images of the training set.
        batch_size: Images a batch of one process.
        multiple: What the number of batches of an epoch is to be a multiple of.
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
        """Say what the next pass is: of the order with this seed, the batches from the first up to the last."""
        self.seed = seed
        self.share = self._share(first, last)

    def draw(self) -> Tuple[Tensor, torch.Generator]:
        """Indices of the next pass, of a new order where no epoch was set, and the generator that gave their order."""
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
    """A data set by index and seed, what `EpochSampler` gives: an image depends on no other, and on no worker's past.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, seed = key
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs as much as decoding a small image
        return self.dataset[index]
