"""Lists of the images that a run trained and was evaluated on, in its run folder."""
import csv
import logging
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple, Union

import numpy as np

from ..errors import InputError, one_line
from ..files import write_whole
from .dataset import AnySet, ImageSet

_logger = logging.getLogger(__name__)

TRAIN_LIST, EVAL_LIST = 'train.csv', 'validation.csv'  # Files that --train-list and --val-list can read.


def write_split_lists(folder: Path, train: ImageSet, evaluation: ImageSet) -> None:
    """Write the lists of a run into its folder."""
    for name, data in ((TRAIN_LIST, train), (EVAL_LIST, evaluation)):
        with write_whole(folder / name) as file:
            rows = csv.writer(file)
            rows.writerow(('path', 'label'))
            rows.writerows(zip(data.filenames(), (data.class_names[target] for target in data.targets)))


def _read(path: Path) -> Dict[str, str]:
    try:
        with path.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
            rows = csv.reader(file)
            if next(rows, None) != ['path', 'label']:
                raise ValueError("its first line is not 'path,label'")
            return {path: label for path, label in filter(None, rows)}
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"'{path}' of the run is damaged ({one_line(error)}): restore it.") from error


class SplitLists:
    """The lists of a run: class names by path."""

    def __init__(self, folder: Union[str, Path]):
        self.folder = folder
        self.train_list, self.eval_list = Path(folder, TRAIN_LIST), Path(folder, EVAL_LIST)
        self.train, self.evaluation = _read(self.train_list), _read(self.eval_list)
        both = next((path for path in self.train if path in self.evaluation), None)
        if both is not None:
            raise InputError(
                f"'{both}' is in '{self.train_list}' and in '{self.eval_list}': the run would be evaluated on a "
                'training image. Restore the lists.')

    @classmethod
    def find(cls, folder: Union[None, str, Path]) -> Optional['SplitLists']:
        """The lists in a run folder, or None if the folder lacks one of them."""
        if folder is None or not all(Path(folder, name).is_file() for name in (TRAIN_LIST, EVAL_LIST)):
            return None
        return cls(folder)

    def is_same_data(self, data: ImageSet) -> bool:
        """Whether nearly all listed images are in a set."""
        paths = set(data.filenames() if data.has_paths else ())
        found = sum(path in paths for listed in (self.train, self.evaluation) for path in listed)
        return found >= 0.9 * (len(self.train) + len(self.evaluation))

    def warn_about_trained(self, data: AnySet, name: str, moved: bool) -> None:
        """Warn of images that may be training images, by their path, or by folder and name if they may have `moved`."""
        def endings(paths: Iterable[str]) -> List[str]:
            return ['/'.join(path.split('/')[-2:]) if moved else path for path in paths]

        trained = set(endings(self.train))
        paths = data.filenames() if isinstance(data, ImageSet) and data.has_paths else ()
        count = sum(path in trained for path in endings(paths))
        if count:
            _logger.warning(
                f"{count} images of '{name}' have the {'folder and the name' if moved else 'path'} of a training image "
                f"of '{self.folder}'. If they are the same images, the figures are too good. '{self.eval_list}' lists "
                'the held-out images.')

    def split(self, data: ImageSet) -> Tuple[ImageSet, ImageSet]:
        """Split a training set as the run did."""
        paths = data.filenames()
        train, evaluation = (
            np.flatnonzero([path in listed for path in paths]) for listed in (self.train, self.evaluation))
        for listed, found in ((TRAIN_LIST, train), (EVAL_LIST, evaluation)):
            if not len(found):
                raise InputError(
                    f"None of the images that '{self.folder}' lists in {listed} is in the data: give --data-dir and "
                    '--val-list as in training.')
        found = len(train) + len(evaluation)
        new, lost = len(paths) - found, len(self.train) + len(self.evaluation) - found
        held_out = data.take(evaluation)
        held_out.notes += [f'{count} {what}' for count, what in (
            (new, 'images that the run does not list'), (lost, 'images that it lists are not there')) if count]
        held_out.origin = f"the list '{self.eval_list}'"
        return data.take(train), held_out

    def check_labels(self, evaluation: ImageSet) -> None:
        """Raise an InputError if an evaluation image has another label than in the run."""
        for path, target in zip(evaluation.filenames(), evaluation.targets):
            label = evaluation.class_names[target]
            if label != self.evaluation[path]:
                raise InputError(
                    f"'{path}' is of class '{label}' here and of '{self.evaluation[path]}' in '{self.eval_list}': give "
                    f'the options of training, or --val-list {self.eval_list}.')
