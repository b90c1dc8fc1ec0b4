"""The prior of the classifiers: which class frequencies the logits stand for, and how others take their place."""
import math
from typing import List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

Frequencies = Union[None, str, Sequence[float]]  # 'uniform', 'train', or one positive number for each class


class Prior(nn.Module):
    """Adds an offset to the logits in eval mode: the log of the target prior, minus the log of the classifiers' prior.

    Arguments and attributes are as in `Shike.set_training_prior` and `Shike.set_target_prior`.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.class_counts: Optional[List[int]] = None
        self.classifier_prior: Optional[str] = None
        self.target_prior: Frequencies = None
        self.register_buffer('offset', None, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        return logits if self.training or self.offset is None else logits + self.offset

    def set_training(self, class_counts: Optional[Sequence[int]], classifier_prior: Optional[str]) -> None:
        """Set what the classifiers were trained on, and drop the target."""
        if class_counts is not None:
            class_counts = [int(count) for count in class_counts]
            self._check(class_counts, 'class_counts')
        if classifier_prior not in (None, 'uniform', 'train'):
            raise ValueError(f"classifier_prior must be 'uniform', 'train' or None, got {classifier_prior!r}.")
        self.class_counts, self.classifier_prior = class_counts, classifier_prior
        self.target_prior = self.offset = None

    def set_target(self, prior: Frequencies, like: Tensor) -> None:
        """Set the target prior; the offset gets the device and data type of `like`."""
        if prior is not None and not isinstance(prior, str):
            prior = [float(value) for value in prior]
        offset = self._offset(prior)
        self.target_prior, self.offset = prior, None if offset is None else offset.to(like.device, like.dtype)

    def _offset(self, prior: Frequencies) -> Optional[Tensor]:
        if prior is None:
            return None
        if not isinstance(prior, str):
            self._check(prior, 'The target prior')
        elif prior not in ('uniform', 'train'):
            raise ValueError(f"The target prior must be 'uniform', 'train' or numbers, got '{prior}'.")
        if self.classifier_prior is None:
            raise ValueError(
                'The model does not say which prior its classifiers were trained for, so it cannot be replaced: call '
                "model.set_training_prior(class_counts, 'uniform') after balanced softmax, or with 'train' after "
                'plain cross-entropy.')
        if prior == self.classifier_prior:
            return None
        return self._log(prior) - self._log(self.classifier_prior)

    def _log(self, prior: Union[str, Sequence[float]]) -> Tensor:
        """Logarithm of a prior in float64. Zeros stand for the uniform one: softmax ignores a constant."""
        if prior == 'uniform':
            return torch.zeros(self.num_classes, dtype=torch.float64)
        if prior == 'train' and self.class_counts is None:
            raise ValueError(
                'The model does not know its training images of each class, which the training prior needs: call '
                'model.set_training_prior(class_counts, classifier_prior).')
        values = torch.tensor(self.class_counts if prior == 'train' else prior, dtype=torch.float64)
        return (values / values.sum()).log()

    def _check(self, values: Sequence[float], what: str) -> None:
        if len(values) != self.num_classes:
            raise ValueError(f'{what} has {len(values)} values, but the model has {self.num_classes} classes.')
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f'{what} holds {value:g}, expected positive numbers: give a rare class a small one.')
