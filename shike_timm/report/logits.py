"""The contents of a report: logits of an evaluation split, its images and classes, and the costs of experts."""
import copy
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..costs import count_flops, inference_costs
from ..data.dataset import AnySet, ImageSet
from ..data.decode import open_image
from ..errors import InputError, one_line
from ..files import write_whole
from ..metrics import MOST_EXPERTS, ShotConfig, all_subsets, shot_numbers
from ..models import Shike
from ..pretrained.folder import check_threshold
from ..pretrained.load import TrainedModel

_ARRAYS = ('logits', 'targets', 'paths', 'class_names', 'class_counts', 'shots', 'costs')


@dataclass
class SavedLogits:
    """Logits of an evaluation split."""

    logits: np.ndarray  # logits of each expert [N, M, C], float32
    targets: np.ndarray  # class indices [N]
    paths: List[str]  # path of each image, or its index in the data set [N]
    class_names: List[str]  # class names in label order [C]
    class_counts: np.ndarray  # training images of each class [C]
    shots: np.ndarray  # shot division of each class [C], as its place in `shike_timm.metrics.SHOTS`
    costs: List[Dict[str, Any]] = field(default_factory=list)  # subsets of `experts` with their `gmacs`
    name: str = 'model'
    run: Optional[Path] = None  # the run folder of the model
    open_image: Optional[Callable[[int], Image.Image]] = None  # opens an image by index; None: by path
    reject_threshold: Optional[float] = None  # probability below which the class of an image is unknown

    def __post_init__(self):
        self.class_counts = np.asarray(self.class_counts, dtype=np.int64)
        # Names of files and folders may hold bytes that are not text.
        self.class_names = [str(one).encode('utf-8', 'replace').decode() for one in self.class_names]
        self.paths = [str(one).encode('utf-8', 'replace').decode() for one in self.paths]

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[2]

    def image(self, index: int) -> Optional[Image.Image]:
        """The image at an index, or None if it cannot be opened by its path."""
        if self.open_image is not None:
            return self.open_image(index)
        try:
            return open_image(self.paths[index]).convert('RGB') if os.path.isabs(self.paths[index]) else None
        except Exception:  # A decoder may raise any error for a damaged file.
            return None


def save_logits(path: Union[str, Path], saved: SavedLogits) -> None:
    """Write an npz file in one step."""
    arrays = {key: getattr(saved, key) for key in _ARRAYS}
    arrays.update(
        paths=np.array(saved.paths, dtype=str), class_names=np.array(saved.class_names, dtype=str),
        costs=json.dumps(saved.costs))
    if saved.reject_threshold is not None:
        arrays.update(reject_threshold=saved.reject_threshold)
    with write_whole(path, 'wb') as file:
        np.savez(file, **arrays)


def load_logits(path: Union[str, Path]) -> SavedLogits:
    """Read what `save_logits` wrote."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"'{path}' does not exist: give a run folder, or a file of shike eval --save-logits.")
    try:
        with np.load(path, allow_pickle=False) as file:
            logits, targets, paths, names, counts, shots, costs = (file[key] for key in _ARRAYS)
            threshold = float(file['reject_threshold']) if 'reject_threshold' in file else None
        num_images, _, num_classes = logits.shape
        for array, kinds, shape in (
                (logits, 'f', (num_images, max(logits.shape[1], 1), max(num_classes, 1))),
                (targets, 'iu', (max(num_images, 1),)), (paths, 'U', (num_images,)), (names, 'U', (num_classes,)),
                (counts, 'iu', (num_classes,)), (shots, 'iu', (num_classes,))):
            if array.dtype.kind not in kinds or array.shape != shape:
                raise ValueError(f'an array of {array.dtype} is {array.shape}, expected {shape}')
        if not np.isfinite(logits).all():
            raise ValueError('its logits are not finite')
        if targets.min() < 0 or targets.max() >= num_classes or counts.min() < 1 or not set(shots) <= {0, 1, 2}:
            raise ValueError(f'it has targets, counts or shots that {num_classes} classes cannot have')
        check_threshold('it', threshold)
        costs = [dict(one, experts=list(one['experts']), gmacs=float(one['gmacs'])) for one in json.loads(str(costs))]
    except Exception as error:  # A damaged file can make NumPy raise nearly any error.
        raise InputError(
            f"'{path}' is damaged or not a file of shike eval --save-logits ({one_line(error)}): save the logits "
            'again.') from error
    run = path.parent if (path.parent / 'summary.csv').exists() else None
    return SavedLogits(
        logits.astype(np.float32, copy=False), targets, paths.tolist(), names.tolist(), counts, shots, costs, path.stem,
        run, reject_threshold=threshold)


def check_report(folder: str, cam: Optional[Sequence[str]] = None) -> None:
    """Raise an InputError if a report, with maps of the images `cam`, cannot be drawn or written to a folder."""
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
        return [str(i) for i in range(number)], None  # The stated length of a stream may be too large.
    read = (~data.unreadable).nonzero()[:, 0].tolist()
    root = os.path.abspath(data.source.root) if data.has_paths else ''
    return [os.path.join(root, data.filename(i)) for i in read], lambda i: data.read(read[i])


def collect(
        trained: TrainedModel, data: AnySet, kept: Sequence[Tuple[Tensor, Tensor]], shots: ShotConfig, **fields: Any,
) -> SavedLogits:
    """Add images and classes to the logits that `shike_timm.metrics.evaluate` kept. `fields` are of `SavedLogits`."""
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
