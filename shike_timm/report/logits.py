"""Saved logits of an evaluation split, and the facts of its images and classes for a report."""
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

import numpy as np
from PIL import Image

from ..data.decode import open_image
from ..errors import InputError, one_line
from ..files import write_whole
from ..pretrained.folder import check_threshold

_ARRAYS = ('logits', 'targets', 'paths', 'class_names', 'class_counts', 'shots', 'costs')


@dataclass
class SavedLogits:
    """Logits of an evaluation split."""

    logits: np.ndarray  # of each expert [N, M, C], float32
    targets: np.ndarray  # class indices [N]
    paths: List[str]  # path of each image, or its index in the data set [N]
    class_names: List[str]  # in label order [C]
    class_counts: np.ndarray  # training images of each class [C]
    shots: np.ndarray  # shot division of each class [C], as its place in `shike_timm.metrics.SHOTS`
    costs: List[Dict[str, Any]] = field(default_factory=list)  # subsets of `experts` with their `gmacs`
    name: str = 'model'
    run: Optional[Path] = None  # the run folder of the model
    open_image: Optional[Callable[[int], Image.Image]] = None  # opens the image of an index. None: by its path
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
        """The image of an index, None if it cannot be opened."""
        if self.open_image is not None:
            return self.open_image(index)
        try:
            return open_image(self.paths[index]).convert('RGB') if os.path.isabs(self.paths[index]) else None
        except Exception:  # A decoder may raise anything for a damaged file.
            return None


def save_logits(path: Union[str, Path], saved: SavedLogits) -> None:
    """Write an npz file in one step."""
    arrays = {key: getattr(saved, key) for key in _ARRAYS}
    arrays.update(
        paths=np.array(saved.paths, dtype=str), class_names=np.array(saved.class_names, dtype=str),
        costs=json.dumps(saved.costs), **(
            {} if saved.reject_threshold is None else dict(reject_threshold=saved.reject_threshold)))
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
    except Exception as error:  # A damaged file can make NumPy raise nearly anything.
        raise InputError(
            f"'{path}' is damaged or not a file of shike eval --save-logits ({one_line(error)}): save the logits "
            'again.') from error
    run = path.parent if (path.parent / 'summary.csv').exists() else None
    return SavedLogits(
        logits.astype(np.float32, copy=False), targets, paths.tolist(), names.tolist(), counts, shots, costs, path.stem,
        run, reject_threshold=threshold)
