"""Saved logits: what a model said of each image of an evaluation split, and what is known of the classes."""
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import numpy as np
from PIL import Image

from ..errors import InputError

__all__ = ['SavedLogits', 'load_logits', 'save_logits']

_ARRAYS = ('logits', 'targets', 'paths', 'class_names', 'class_counts', 'shots', 'costs')


@dataclass
class SavedLogits:
    """What a model said of an evaluation split.

    Attributes:
        logits: Expert logits [N, M, C], float32.
        targets: Class indices [N].
        paths: Where each image lies, or its index in the data set [N].
        class_names: Names of the classes in label order [C].
        class_counts: Training images of each class [C].
        shots: Shot division of each class [C], as its place in `shike_timm.metrics.SHOTS`.
        costs: Choices of `experts` with their `gmacs`, as `eval.py --expert-subsets` tells them; may be empty.
        name: What to call the model.
        run: Its run folder, None where there is none.
        open_image: Gives the PIL image of an index, by its path if None.
    """

    logits: np.ndarray
    targets: np.ndarray
    paths: List[str]
    class_names: List[str]
    class_counts: np.ndarray
    shots: np.ndarray
    costs: List[Dict[str, Any]] = field(default_factory=list)
    name: str = 'model'
    run: Optional[Path] = None
    open_image: Optional[Callable[[int], Image.Image]] = None

    def __post_init__(self):
        self.class_counts = np.asarray(self.class_counts, dtype=np.int64)
        # A folder's name may hold bytes that are no text.
        self.class_names = [str(one).encode('utf-8', 'replace').decode() for one in self.class_names]
        self.paths = [str(one).encode('utf-8', 'replace').decode() for one in self.paths]

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        return self.logits.shape[2]

    def image(self, index: int) -> Optional[Image.Image]:
        """The image of an index, None where it cannot be had."""
        if self.open_image is not None:
            return self.open_image(index)
        try:
            return Image.open(self.paths[index]).convert('RGB') if os.path.isabs(self.paths[index]) else None
        except OSError:
            return None


def save_logits(path: Union[str, Path], saved: SavedLogits) -> None:
    """Write logits [N, M, C] and what belongs to them as an npz file, in one step."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('wb') as file:
        np.savez(
            file,
            logits=saved.logits,
            targets=saved.targets,
            paths=np.array(saved.paths, dtype=str),
            class_names=np.array(saved.class_names, dtype=str),
            class_counts=saved.class_counts,
            shots=saved.shots,
            costs=json.dumps(saved.costs),
        )
    temporary.replace(path)


def _check_shapes(path: Path, logits: np.ndarray, targets: np.ndarray, by_image: Sequence, by_class: Sequence) -> None:
    shape = logits.shape
    if len(shape) != 3 or not all(shape):
        raise InputError(f"'{path}' has logits of shape {shape}, expected [images, experts, classes]: save them again.")
    if {len(one) for one in (targets, *by_image)} != {shape[0]} or {len(one) for one in by_class} != {shape[2]}:
        raise InputError(f"'{path}' has arrays that do not fit its logits of shape {shape}: save them again.")
    if targets.min() < 0 or targets.max() >= shape[2]:
        raise InputError(f"'{path}' has targets outside its {shape[2]} classes: save them again.")


def load_logits(path: Union[str, Path]) -> SavedLogits:
    """Read what `save_logits` wrote.

    Raises:
        InputError: If it is missing, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"'{path}' does not exist: give a run folder, or what eval.py --save-logits wrote.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in _ARRAYS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' is damaged or not what eval.py --save-logits writes: save it again.") from error
    logits, targets, paths, names, counts, shots = (arrays[key] for key in _ARRAYS[:-1])
    _check_shapes(path, logits, targets, [paths], [names, counts, shots])
    run = path.parent if (path.parent / 'summary.csv').exists() else None
    return SavedLogits(
        logits, targets, paths.tolist(), names.tolist(), counts, shots, json.loads(str(arrays['costs'])), path.stem,
        run)
