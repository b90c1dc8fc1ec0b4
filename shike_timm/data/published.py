"""ImageNet-LT, iNaturalist 2018 and Places-LT: the published lists over the folder of images as it is downloaded."""
import hashlib
import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional, Sequence, Tuple

from ..errors import InputError
from .datasets import DataRequest, DatasetEntry, ImageSet, register_dataset, table_set
from .files import open_files
from .folders import check_apart, list_folder, without
from .images import image_extensions
from .lists import load_list

__all__ = ['PUBLISHED', 'Published', 'counts_digest']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A published long-tailed data set.

    Attributes:
        title: What it is called.
        num_classes: Classes.
        train: Usual name of its training list, and that list's SHA-256.
        test: The same of the list to evaluate on.
        spellings: Patterns and replacements that make other places of an image from its path on the lists.
        whole: Folder of all images by class, of which those that are not to be evaluated on are trained on where there
            is no training list.
        whole_counts: Number of those images, and `counts_digest` of them.
    """

    title: str
    num_classes: int
    train: Tuple[str, str]
    test: Tuple[str, str]
    spellings: Sequence[Tuple[str, str]] = ()
    whole: Optional[str] = None
    whole_counts: Tuple[int, str] = (0, '')


def counts_digest(class_counts: Sequence[int]) -> str:
    """SHA-256 of the images of each class, as numbers in label order with blanks between."""
    return hashlib.sha256(' '.join(map(str, class_counts)).encode()).hexdigest()


def _root(published: Published, request: DataRequest) -> str:
    if not request.root:
        raise InputError(f"No folder of data was named for dataset '{request.name}': give it as --data-dir.")
    if not os.path.exists(request.root):
        raise InputError(f"data-dir '{request.root}' does not exist: give the folder of {published.title}.")
    return request.root


def _find_list(root: str, name: str, given: Optional[str], option: str, needed: bool = True) -> Optional[str]:
    """Path of a list: the given one, or that of its name in the folder of the data or a folder in it.

    Raises:
        InputError: If there is none and one is needed.
    """
    places = (Path(root, name), *sorted(Path(root).glob(f'*/{name}')))
    path = given or next((str(place) for place in places if place.is_file()), None)
    if path is None and needed:
        raise InputError(f"data-dir '{root}' holds no '{name}': put the list there, or name one with {option}.")
    return path


def _is(path: str, digest: str) -> bool:
    """Whether a list is the one of this SHA-256."""
    return os.path.isfile(path) and hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest


def _load_list(published: Published, request: DataRequest, path: str, digest: str) -> ImageSet:
    data = load_list(request, path, published.spellings)
    if not _is(path, digest):
        _logger.warning(f"'{path}' is not the published list of {published.title}, and is taken as it is.")
    return data


def _load_whole(published: Published, request: DataRequest, root: str, test: ImageSet, exact: bool) -> ImageSet:
    """What the folder of all images has beside those to evaluate on; the class is the innermost folder.

    Raises:
        InputError: If there is nothing, or not what was published and that is to be exact.
    """
    folder = os.path.join(root, published.whole or '')
    if not os.path.isdir(folder):
        raise InputError(
            f"data-dir '{root}' has no folder '{published.whole}': give the one that it lies in, or name a list with "
            '--train-list.')
    kinds, names, labels = image_extensions(), [], []
    for path, files in list_folder(folder, Counter()).items():
        images = [file for file in files if os.path.splitext(file)[1].lower() in kinds]
        names += [f'{published.whole}/{path}/{file}' for file in images]
        labels += [path.rpartition('/')[2]] * len(images)
    if not names:
        raise InputError(f"'{folder}' holds no images: unpack them there.")
    train = without(table_set(request, names, labels, [], lambda names: open_files(root, names)), root, test)
    assert train.class_counts is not None  # as of every table
    number, digest = published.whole_counts
    if exact and (sum(train.class_counts), counts_digest(train.class_counts)) != (number, digest):
        raise InputError(
            f"'{folder}' has {sum(train.class_counts)} images of {len(train.class_counts)} classes to train on, "
            f'expected the {number} of {published.num_classes} of {published.title}, each class as large as it was '
            'published: complete it, or name a list with --train-list.')
    return train


def _load_eval(published: Published, request: DataRequest) -> ImageSet:
    name, digest = published.test
    path = _find_list(_root(published, request), name, request.val_list, '--val-list')
    return _load_list(published, request, str(path), digest)


def _load_train(published: Published, request: DataRequest) -> Tuple[ImageSet, Optional[ImageSet]]:
    root = _root(published, request)
    (name, digest), (test_name, test_digest) = published.train, published.test
    path = _find_list(root, name, request.train_list, '--train-list', needed=published.whole is None)
    test_path = str(_find_list(root, test_name, request.val_list, '--val-list'))
    test = _load_list(published, request, test_path, test_digest)
    if path is None:
        train = _load_whole(published, request, root, test, exact=_is(test_path, test_digest) and not request.class_map)
    else:
        train = _load_list(published, request, path, digest)
        check_apart(train, test, path, test_path)
    return train, None if request.holdout else test


PUBLISHED = dict(
    imagenet_lt=Published(
        'ImageNet-LT',
        1000,
        ('ImageNet_LT_train.txt', 'efdbdad4f050237c310b2f354cf95a8b1d7c8d57a63c4ea4bb6bf2bcb012f37f'),
        ('ImageNet_LT_test.txt', 'd1590191cf8a71fada7b1aaedaa2d139a2aea93ff2f1b755319d0bd8dbaa55d5'),
        # As it comes: in the folders of the archive, and validation images without folders of classes.
        ((r'^', 'ILSVRC/Data/CLS-LOC/'), (r'^val/[^/]+', 'val'), (r'^val/[^/]+', 'ILSVRC/Data/CLS-LOC/val')),
    ),
    inat2018=Published(
        'iNaturalist 2018',
        8142,
        ('iNaturalist18_train.txt', '158fa2dca040e6e95b06c68c7cdff40fe696f202793b2aa0e8b854321ffe1adf'),
        ('iNaturalist18_val.txt', 'efaeff65f80641b60864470e6f255aa69453406ef5717eec8c6681748f3a61f3'),
        whole='train_val2018',
        whole_counts=(437_513, 'fd1316331b954f7d4ceee67ff162e30901f6933b836789e4422593bd80f1b01b'),
    ),
    places_lt=Published(
        'Places-LT',
        365,
        ('Places_LT_train.txt', '726c4871dcbf07ce2f857703bfe32e9a83ffbf52d704239f6d95c4f4f4c247f7'),
        ('Places_LT_test.txt', '44eee8441c8098c59195465abede425721bc35525d75209f9433b161a6eb37bc'),
        ((r'^', 'places365_standard/'),),
    ),
)

for _name, _published in PUBLISHED.items():
    register_dataset(DatasetEntry(
        _name,
        partial(_load_train, _published),
        partial(_load_eval, _published),
        eval_split='validation' if _name == 'inat2018' else 'test',
        num_classes=_published.num_classes,
    ))
