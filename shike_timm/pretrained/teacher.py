"""A trained model as a teacher."""
from typing import Sequence

import torch
from timm.task import DistillationTeacher

from ..data import TrainingData
from ..errors import InputError, one_line
from .folder import read_config


def load_teacher(
        name: str, data: TrainingData, input_size: Sequence[int], device: torch.device, held_out: bool = False,
) -> DistillationTeacher:
    """Load the trained model of `--kd-model-name`, of any architecture. Its logits are in the label order of the data.

    With `held_out`, a teacher that may have been trained on the images held out for evaluation raises an InputError.
    """
    try:
        teacher = DistillationTeacher(name, in_chans=input_size[0], device=device)
        if input_size[0] == 1:  # A teacher of colour images has three means.
            teacher.mean_kd, teacher.std_kd = (
                value.mean(1, keepdim=True) for value in (teacher.mean_kd, teacher.std_kd))
        with torch.no_grad():
            num_classes = teacher(torch.zeros(1, *input_size, device=device)).shape[-1]
        cfg = getattr(teacher.model, 'pretrained_cfg', {})
        config = read_config(name, cfg.get('file')) if ':' in name or cfg.get('file') else {}
    except Exception as error:  # Wrong names and damaged folders raise errors of many types.
        raise InputError(f"--kd-model-name '{name}' cannot teach: {one_line(error)}.") from error
    if num_classes != data.num_classes:
        raise InputError(
            f"--kd-model-name '{name}' has {num_classes} classes, the data has {data.num_classes}: name a model that "
            'was trained on the same classes.')
    names, counts = list(cfg.get('label_names') or data.class_names), config.get('class_counts')
    if names != data.class_names:
        strays = [c for c, one in enumerate(names) if one not in data.class_names]
        if strays:
            raise InputError(
                f"--kd-model-name '{name}' calls class {strays[0]} '{names[strays[0]]}', which the data does not have "
                f"(there it is '{data.class_names[strays[0]]}'): name a model that was trained on the same classes.")
        places = torch.tensor([names.index(own) for own in data.class_names], device=device)
        teacher.register_forward_hook(lambda module, images, logits: logits[:, places])
        counts = counts and [counts[place] for place in places.tolist()]
    if held_out and counts != list(data.class_counts):
        raise InputError(
            f"--kd-model-name '{name}' may have been trained on the images that --holdout keeps for evaluation: train "
            'the teacher with the same --holdout.')
    return teacher
