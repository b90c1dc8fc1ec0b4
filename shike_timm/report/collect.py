"""Collects the contents of a report from an evaluation: logits, images, classes and the costs of experts."""
import copy
import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..costs import count_flops, inference_costs
from ..data.dataset import AnySet, ImageSet
from ..errors import InputError
from ..metrics import MOST_EXPERTS, ShotConfig, all_subsets, shot_numbers
from ..models import Shike
from ..pretrained.load import TrainedModel
from .logits import SavedLogits


def check_report(folder: str, cam: Optional[Sequence[str]] = None) -> None:
    """Check that a report, with maps of the images `cam`, can be drawn and written to a folder."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        if cam:
            import pytorch_grad_cam  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"A report needs {error.name}: pip install 'shike-timm[report]'.") from error
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"The report cannot go to '{folder}', which is a file: give the name of a folder.")


def _images(data: AnySet, number: int) -> Tuple[List[str], Optional[Callable[[int], Image.Image]]]:
    """Paths (or indices) of the readable images in order, and a function that opens one of them."""
    if not isinstance(data, ImageSet):
        return [str(i) for i in range(number)], None  # A stream may be shorter than it says.
    read = (~data.unreadable).nonzero()[:, 0].tolist()
    root = os.path.abspath(data.source.root) if data.has_paths else ''
    return [os.path.join(root, data.filename(i)) for i in read], lambda i: data.read(read[i])


def collect(
        trained: TrainedModel, data: AnySet, kept: Sequence[Tuple[Tensor, Tensor]], shots: ShotConfig, **fields: Any,
) -> SavedLogits:
    """The logits that `shike_timm.metrics.evaluate` kept, with the images and classes. Fields are of `SavedLogits`."""
    logits, targets = (torch.cat(one).numpy() for one in zip(*kept))
    names = trained.class_names or data.class_names or [str(c) for c in range(logits.shape[2])]
    paths, open_image = _images(data, len(targets))
    counts = np.array(trained.class_counts)
    divisions = shot_numbers(trained.shot_counts or counts.tolist(), shots)
    return SavedLogits(
        logits, targets, paths, names, counts, divisions, open_image=open_image,
        reject_threshold=trained.reject_threshold, **fields)


def _reduced_models(model: Shike) -> Iterator[Tuple[Tuple[int, ...], Shike]]:
    """Every subset of the experts, with a copy of the model that has only these."""
    for subset in all_subsets(model.num_experts):
        reduced = copy.deepcopy(model).eval()
        reduced.set_experts(subset)
        yield subset, reduced


@torch.inference_mode()
def count_gmacs(model: Shike, image: Tensor, passes: int = 1) -> List[Dict[str, Any]]:
    """GMACs of every subset of up to four experts, which see an image [1, in_chans, H, W] in `passes` forwards."""
    if model.num_experts > MOST_EXPERTS:
        return []
    return [
        dict(experts=list(subset), gmacs=passes * count_flops(partial(reduced, image)) / 2e9)
        for subset, reduced in _reduced_models(model)]


def add_costs(subsets: List[Dict[str, Any]], model: Shike, images: Tensor, passes: int = 1) -> None:
    """Add parameters, GMACs and images a second to the metrics of each subset."""
    images = images[:16] if images.device.type == 'cpu' else images  # On a CPU larger batches are no faster.
    costs = inference_costs(dict(_reduced_models(model)), images)
    for one in subsets:
        cost = costs[tuple(one['experts'])]
        one.update(cost, gmacs=passes * cost['gmacs'], images_per_second=cost['images_per_second'] / passes)
