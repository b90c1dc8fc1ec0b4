"""Frequencies of classes: those that logits answer for, and what has them answer for others."""
import math
from typing import Optional, Sequence, Union

import torch
from torch import Tensor

__all__ = ['Prior', 'check_frequencies', 'prior_offset']

Prior = Union[None, str, Sequence[float]]  # 'uniform', 'train', or numbers in proportion to the frequencies


def check_frequencies(values: Sequence[float], num_classes: int, what: str) -> None:
    """Raise a ValueError that names `what` unless there is one positive number for each class."""
    if len(values) != num_classes:
        raise ValueError(f'{what} has {len(values)} values, but the model {num_classes} classes.')
    wrong = [value for value in values if not 0 < value < math.inf]
    if wrong:
        raise ValueError(f'{what} holds {wrong[0]:g}, expected positive numbers: give a rare class a small one.')


def prior_offset(
        prior: Prior,
        classifier_prior: Optional[str],
        class_counts: Optional[Sequence[int]],
        num_classes: int,
) -> Optional[Tensor]:
    """What to add to logits of one prior so that they answer for another: its logarithm, less that of the one before.

    Args:
        prior: What they are to answer for, as for `Shike.set_target_prior`.
        classifier_prior: What they answer for so far, 'uniform' or 'train'; None where it is not known.
        class_counts: Training images of each class [num_classes], None where they are not known.
        num_classes: Classes.

    Returns:
        Offsets [num_classes] in float64, or None where the logits stay as they are.

    Raises:
        ValueError: If a prior that this needs is not known, or `prior` is not as described there.
    """
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior not in ('uniform', 'train'):
            raise ValueError(f"The target prior must be 'uniform', 'train' or numbers, got '{prior}'.")
    else:
        check_frequencies(prior, num_classes, 'The target prior')
    if classifier_prior is None:
        raise ValueError(
            'The model does not say which prior its classifiers answer for, so that none can be put in place of '
            "it: after balanced softmax model.set_training_prior(class_counts, 'uniform') tells it, after plain "
            "cross-entropy 'train'.")
    if prior == classifier_prior:
        return None
    return _log(prior, class_counts, num_classes) - _log(classifier_prior, class_counts, num_classes)


def _log(prior: Union[str, Sequence[float]], class_counts: Optional[Sequence[int]], num_classes: int) -> Tensor:
    """Logarithms of a prior; zeros, which softmax takes for the same, where it is uniform."""
    if prior == 'uniform':
        return torch.zeros(num_classes, dtype=torch.float64)
    if prior == 'train' and class_counts is None:
        raise ValueError(
            'The model does not know its training images of each class, which make the training prior: tell it '
            'with model.set_training_prior(class_counts, classifier_prior).')
    values = torch.tensor(class_counts if prior == 'train' else prior, dtype=torch.float64)
    return (values / values.sum()).log()
