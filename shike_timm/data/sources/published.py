"""ImageNet-LT, iNaturalist 2018 and Places-LT, from their published lists and the downloaded folder of images."""
import hashlib
import logging
import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Optional, Sequence, Tuple

from ...errors import InputError
from ..dataset import ImageSet, label_images
from ..registry import DataSource, register_dataset
from .folder import list_folder, list_images
from .lists import check_disjoint, exclude, load_list
from .tar import open_files

_logger = logging.getLogger(__name__)


def counts_digest(class_counts: Sequence[int]) -> str:
    """SHA-256 of the class counts, as numbers in label order with spaces between."""
    return hashlib.sha256(' '.join(map(str, class_counts)).encode()).hexdigest()


def _has_digest(path: str, digest: str) -> bool:
    return os.path.isfile(path) and hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest


class PublishedSource(DataSource):
    """A published long-tailed data set."""

    title: str
    train_list: Tuple[str, str]  # Usual name of the list, and its SHA-256.
    eval_list: Tuple[str, str]
    spellings: Sequence[Tuple[str, str]] = ()  # Patterns and replacements for other paths of an image.
    whole: Optional[str] = None  # Folder of all images, for training without a training list.
    whole_counts: Tuple[int, str] = (0, '')  # Number of these training images, and `counts_digest` of their classes.

    @property
    def root(self) -> str:
        """Folder of the data, which must exist."""
        root = self.config.data_dir
        if not root:
            raise InputError(f"No folder of data was named for dataset '{self.config.dataset}': give it as --data-dir.")
        if not os.path.exists(root):
            raise InputError(f"data-dir '{root}' does not exist: give the folder of {self.title}.")
        return root

    def _find_list(self, name: str, option: str) -> str:
        """Path of a list: the given path, or the file of that name in the data folder or directly in a sub-folder."""
        places = (Path(self.root, name), *sorted(Path(self.root).glob(f'*/{name}')))
        path = getattr(self.config, option) or next((str(place) for place in places if place.is_file()), '')
        if not path and (option == 'val_list' or self.whole is None):
            raise InputError(
                f"data-dir '{self.root}' holds no '{name}': put the list there, or name one with "
                f"--{option.replace('_', '-')}.")
        return path

    def _load_list(self, path: str, digest: str) -> ImageSet:
        data = load_list(self.config, path, self.spellings)
        if not _has_digest(path, digest):
            _logger.warning(f"'{path}' is not the published list of {self.title}, and is taken as it is.")
        return data

    @cached_property
    def _evaluation(self) -> Tuple[str, ImageSet]:
        """The path of the list to evaluate on, and its images."""
        name, digest = self.eval_list
        path = self._find_list(name, 'val_list')
        return path, self._load_list(path, digest)

    def evaluation(self, class_names: Optional[Sequence[str]] = None) -> ImageSet:
        return self._evaluation[1]

    def train(self, class_names: Optional[Sequence[str]] = None) -> ImageSet:
        name, digest = self.train_list
        path = self._find_list(name, 'train_list')
        eval_path, evaluation = self._evaluation
        if not path:
            return self._load_rest(eval_path, evaluation)
        train = self._load_list(path, digest)
        check_disjoint(train, evaluation, path, eval_path)
        return train

    def _load_rest(self, eval_path: str, evaluation: ImageSet) -> ImageSet:
        """All images that are not in the evaluation set. The class is the name of the innermost folder."""
        folder = os.path.join(self.root, self.whole or '')
        if not os.path.isdir(folder):
            raise InputError(
                f"data-dir '{self.root}' has no folder '{self.whole}': give the one that it lies in, or name a list "
                'with --train-list.')
        folders = list_images(list_folder(folder, Counter(), []))
        paths = [f'{self.whole}/{path}/{file}' for path, files in folders.items() for file in files]
        labels = [path.rpartition('/')[2] for path, files in folders.items() for _ in files]
        if not paths:
            raise InputError(f"'{folder}' holds no images: unpack them there.")
        train = exclude(label_images(self.config, open_files(self.root, paths), labels), evaluation, self.root)
        counts = train.class_counts
        is_exact = _has_digest(eval_path, self.eval_list[1]) and not self.config.class_map
        if is_exact and (sum(counts), counts_digest(counts)) != self.whole_counts:
            raise InputError(
                f"'{folder}' has {sum(counts)} images of {len(counts)} classes to train on, expected the "
                f'{self.whole_counts[0]} of {self.num_classes} of {self.title}, each class as large as it was '
                'published: complete it, or name a list with --train-list.')
        return train


@register_dataset('imagenet_lt')
class ImageNetLT(PublishedSource):
    title, num_classes, eval_split = 'ImageNet-LT', 1000, 'test'
    train_list = 'ImageNet_LT_train.txt', 'efdbdad4f050237c310b2f354cf95a8b1d7c8d57a63c4ea4bb6bf2bcb012f37f'
    eval_list = 'ImageNet_LT_test.txt', 'd1590191cf8a71fada7b1aaedaa2d139a2aea93ff2f1b755319d0bd8dbaa55d5'
    # The download has the folders of the archive, and its validation images are in one folder.
    spellings = (r'^', 'ILSVRC/Data/CLS-LOC/'), (r'^val/[^/]+', 'val'), (r'^val/[^/]+', 'ILSVRC/Data/CLS-LOC/val')


@register_dataset('inat2018')
class INat2018(PublishedSource):
    title, num_classes, eval_split = 'iNaturalist 2018', 8142, 'validation'
    train_list = 'iNaturalist18_train.txt', '158fa2dca040e6e95b06c68c7cdff40fe696f202793b2aa0e8b854321ffe1adf'
    eval_list = 'iNaturalist18_val.txt', 'efaeff65f80641b60864470e6f255aa69453406ef5717eec8c6681748f3a61f3'
    whole = 'train_val2018'
    whole_counts = 437_513, 'fd1316331b954f7d4ceee67ff162e30901f6933b836789e4422593bd80f1b01b'


@register_dataset('places_lt')
class PlacesLT(PublishedSource):
    title, num_classes, eval_split = 'Places-LT', 365, 'test'
    train_list = 'Places_LT_train.txt', '726c4871dcbf07ce2f857703bfe32e9a83ffbf52d704239f6d95c4f4f4c247f7'
    eval_list = 'Places_LT_test.txt', '44eee8441c8098c59195465abede425721bc35525d75209f9433b161a6eb37bc'
    spellings = ((r'^', 'places365_standard/'),)
