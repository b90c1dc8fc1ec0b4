"""Changes of the logits after training: a temperature divides them, and another class prior replaces their own."""
import math
from typing import Any, List, Optional, Sequence, Union

import torch
from torch import Tensor, nn

Frequencies = Union[None, str, Sequence[float]]  # 'uniform', 'train', or one positive number for each class.


def _check_frequencies(values: Sequence[float], num_classes: int, what: str) -> None:
    if len(values) != num_classes:
        raise ValueError(f'{what} has {len(values)} values, but the model has {num_classes} classes.')
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f'{what} holds {value:g}, expected positive numbers: give a rare class a small one.')


class PriorModel(nn.Module):
    """A model that knows the class prior of its logits, and can adjust the logits to another class prior.

    In eval mode every expert's logits become `logits / temperature + log(target prior) - log(classifier prior)`. In
    training mode they do not change.
    """

    num_classes: int

    def __init__(self):
        super().__init__()
        self.register_buffer('prior_offset', None, persistent=False)
        self.temperature = 1.

    def set_training_prior(self, class_counts: Optional[Sequence[int]], classifier_prior: Optional[str] = None) -> None:
        """Set the class counts and the prior of the training. `set_target_prior` needs them. A saved model keeps them.

        Args:
            class_counts: Training images of each class [num_classes], None if unknown.
            classifier_prior: Class prior of the logits: 'train' for the frequencies of the training set, as after plain
                cross-entropy; 'uniform' for equal frequencies, as after balanced softmax; None if unknown.

        Raises:
            ValueError: If the counts are not one positive number for each class, or the prior is another value.
        """
        counts = None if class_counts is None else [int(count) for count in class_counts]
        if counts is not None:
            _check_frequencies(counts, self.num_classes, 'class_counts')
        if classifier_prior not in (None, 'uniform', 'train'):
            raise ValueError(f"classifier_prior must be 'uniform', 'train' or None, got {classifier_prior!r}.")
        self.class_counts: Optional[List[int]] = counts
        self.classifier_prior = classifier_prior
        self.target_prior: Frequencies = None
        self.prior_offset: Optional[Tensor] = None

    def set_target_prior(self, prior: Frequencies) -> None:
        """Adjust the logits to other class frequencies. A saved or exported model keeps the adjustment.

        Args:
            prior: 'uniform', 'train' (the frequencies of the training set), positive numbers [num_classes] in
                proportion to the frequencies, or None for no adjustment.

        Raises:
            ValueError: If the prior of the training is needed but unknown, or `prior` is another value or not one
                positive number for each class.
        """
        own, offset = self.classifier_prior, None
        if prior is not None and not isinstance(prior, str):
            prior = [float(value) for value in prior]
            _check_frequencies(prior, self.num_classes, 'The target prior')
        elif prior not in (None, 'uniform', 'train'):
            raise ValueError(f"The target prior must be 'uniform', 'train' or numbers, got '{prior}'.")
        if prior is not None and own is None:
            raise ValueError(
                'The model does not say which prior its classifiers were trained for, so it cannot be replaced: call '
                "model.set_training_prior(class_counts, 'uniform') after balanced softmax, or with 'train' after "
                'plain cross-entropy.')
        if prior is not None and prior != own:
            if 'train' in (prior, own) and self.class_counts is None:
                raise ValueError(
                    'The model does not know its training images of each class, which the training prior needs: call '
                    'model.set_training_prior(class_counts, classifier_prior).')
            parameter = next(self.parameters())
            offset = (self._log_prior(prior) - self._log_prior(own)).to(parameter.device, parameter.dtype)
        self.target_prior, self.prior_offset = prior, offset

    def set_temperature(self, temperature: float) -> None:
        """Divide the logits by a positive number, so that probabilities match accuracies. A saved model keeps it.

        Any other value raises a ValueError.
        """
        if isinstance(temperature, (bool, str)) or not 0 < float(temperature) < math.inf:
            raise ValueError(f'The temperature must be a positive number, got {temperature!r}.')
        self.temperature = float(temperature)

    def _log_prior(self, prior: Any) -> Tensor:
        if prior == 'uniform':
            return torch.zeros(self.num_classes, dtype=torch.float64)  # Softmax ignores a constant.
        values = torch.tensor(self.class_counts if prior == 'train' else prior, dtype=torch.float64)
        return (values / values.sum()).log()

    def adjust(self, logits: Tensor) -> Tensor:
        """Apply the temperature and the target prior to the logits in eval mode, and nothing in training mode."""
        if not self.training and self.temperature != 1.:
            logits = logits / self.temperature
        return logits if self.training or self.prior_offset is None else logits + self.prior_offset
