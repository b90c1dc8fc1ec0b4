"""Options of the data: which images, how they are read and how they come in batches."""
from dataclasses import dataclass
from typing import List, Optional

from ..options import option


@dataclass(frozen=True)
class EvalDataConfig:
    """Data."""

    data_dir: Optional[str] = option(None, 'folder of the data, or a tar archive', 'DIR', may_change=True, card='never')
    dataset: str = option(
        '', "cifar10_lt, cifar100_lt, digits_lt, imagenet_lt, inat2018, places_lt, a name of timm's, or none for a "
        'folder or archive of images and for lists')
    val_split: str = option('validation', 'split to evaluate on; the default stands for val and test too')
    val_list: Optional[str] = option(
        None, 'list of the images to evaluate on, with paths below --data-dir: lines of a path and a label, .csv or '
        ".tsv with a header, or COCO's .json", 'FILE', card='changed')
    input_key: Optional[str] = option(
        None,
        "column of the images in tables, and in timm's data sets; path, image, filename, file_name or file by default",
        'COLUMN', card='changed')
    target_key: Optional[str] = option(
        None, 'column of the labels likewise; label, target, class or category by default', 'COLUMN', card='changed')
    class_map: Optional[str] = option(
        None, 'names of the classes in label order, one a line; others are left out', 'FILE', card='changed')
    class_depth: Optional[int] = option(
        None, 'folders below the split whose names make the class; by default what is evident', low=1, card='changed')
    class_stats: Optional[str] = option(
        None, "class counts of a training stream, in timm's format; its class_names, where there are any, name the "
        'labels of streams', 'FILE', card='never')
    val_num_samples: Optional[int] = option(None, 'images of an evaluation stream', low=1, card='never')
    dataset_download: bool = option(False, 'download the data where possible', may_change=True, card='never')
    imb_factor: float = option(100., 'imbalance factor of the *_lt data sets, largest over smallest class')
    imb_type: str = option('exp', 'profile of the *_lt data sets', choices=('exp', 'step'))
    imb_seed: Optional[int] = option(
        None, 'seed of the images that a *_lt set keeps, drawn as LDAM-DRW and its successors draw them; by default the'
        ' first of each class', low=0, card='changed')


@dataclass(frozen=True)
class TrainDataConfig:
    """Training data."""

    train_split: str = option('train', 'split to train on')
    train_list: Optional[str] = option(None, 'list of the images to train on, as --val-list', 'FILE', card='changed')
    train_num_samples: Optional[int] = option(None, 'images of a training stream', low=1, card='never')
    holdout: float = option(
        0., 'keep this share of each class of the training set out of training and evaluate on it; 0.2 where there is '
        'nothing else to evaluate on', 'SHARE', low=0, below=1, card='changed')
    group_key: Optional[str] = option(
        None, 'column, or regular expression to find in paths, that names the group of an image; --holdout keeps groups'
        ' together', 'REGEX|COLUMN', card='changed')
    val_per_class: int = option(
        0, 'set the last N training images of each class of a *_lt set aside before its long-tailed subset is cut, and '
        'evaluate on them', low=0, card='changed')


@dataclass(frozen=True)
class DataConfig(EvalDataConfig, TrainDataConfig):
    """Both sides of the data."""


@dataclass(frozen=True)
class CheckConfig:
    """Checking images."""

    check_images: Optional[bool] = option(
        None, 'read all images once before anything else and leave out what cannot be read; by default of up to 100,000'
        ' images', may_change=True, card='never')


@dataclass(frozen=True)
class PreprocessingConfig:
    """Preprocessing."""

    img_size: Optional[int] = option(None, "side of the images, the model's own by default", low=1)
    input_size: Optional[List[int]] = option(
        None, 'channels, height and width of the images', nargs=3, low=1, card='changed')
    in_chans: Optional[int] = option(None, 'channels of the images, 1 or 3', low=1, card='changed')
    exif: Optional[bool] = option(None, 'turn images as their EXIF orientation says', card='changed')
    pixel_range: Optional[List[float]] = option(
        None, 'values of images of more than 8 bits that become black and white, in place of the range of their type',
        'X', nargs=2, card='changed')
    crop_pct: Optional[float] = option(None, 'centre crop at evaluation', low=0.01, card='changed')
    mean: Optional[List[float]] = option(None, 'channel means, of images in 0..1', nargs='+', card='changed')
    std: Optional[List[float]] = option(None, 'channel standard deviations', nargs='+', card='changed')
    interpolation: Optional[str] = option(
        None, 'interpolation at evaluation', choices=('nearest', 'bilinear', 'bicubic', 'lanczos'), card='changed')


@dataclass(frozen=True)
class SourceConfig(DataConfig, CheckConfig, PreprocessingConfig):
    """The data of a run or an evaluation, and how its images are read."""


@dataclass(frozen=True)
class LoaderConfig:
    """Batches."""

    batch_size: int = option(128, 'images a training batch of each process', low=1, flags=('-b',))
    grad_accum_steps: int = option(1, 'batches of an update, whose gradients are added up', low=1, card='changed')
    validation_batch_size: Optional[int] = option(
        None, 'images an evaluation batch, as many as a training batch by default', low=1, flags=('-vb',),
        may_change=True, card='never')
    device_data: Optional[bool] = option(
        None, 'keep the data on the device and augment it there in large batches rather than in worker processes; by '
        'default where the data set (*_lt, torch/cifar*) and the augmentation allow it', card='changed')
