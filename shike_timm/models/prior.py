"""Priors: the class frequencies that logits stand for, and the offset that exchanges one prior for another."""
import math
from typing import Optional, Sequence, Union

import torch
from torch import Tensor

Frequencies = Union[None, str, Sequence[float]]  # 'uniform', 'train', or one positive number for each class.


def check_frequencies(values: Sequence[float], num_classes: int, what: str) -> None:
    """Check that there is one positive number for each class."""
    if len(values) != num_classes:
        raise ValueError(f'{what} has {len(values)} values, but the model has {num_classes} classes.')
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f'{what} holds {value:g}, expected positive numbers: give a rare class a small one.')


def prior_offset(
        target: Frequencies, own: Optional[str], class_counts: Optional[Sequence[int]], num_classes: int,
) -> Optional[Tensor]:
    """log(target) - log(own prior) for each class in float64, None if nothing is to be added."""
    if target is None:
        return None
    if not isinstance(target, str):
        check_frequencies(target, num_classes, 'The target prior')
    elif target not in ('uniform', 'train'):
        raise ValueError(f"The target prior must be 'uniform', 'train' or numbers, got '{target}'.")
    if own is None:
        raise ValueError(
            'The model does not say which prior its classifiers were trained for, so it cannot be replaced: call '
            "model.set_training_prior(class_counts, 'uniform') after balanced softmax, or with 'train' after "
            'plain cross-entropy.')
    if target == own:
        return None
    if 'train' in (target, own) and class_counts is None:
        raise ValueError(
            'The model does not know its training images of each class, which the training prior needs: call '
            'model.set_training_prior(class_counts, classifier_prior).')

    def log(prior: Union[str, Sequence[float]]) -> Tensor:
        if prior == 'uniform':
            return torch.zeros(num_classes, dtype=torch.float64)  # Softmax ignores a constant.
        values = torch.tensor(class_counts if prior == 'train' else prior, dtype=torch.float64)
        return (values / values.sum()).log()

    return log(target) - log(own)
