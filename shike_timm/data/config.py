"""Options that choose the images, their preprocessing and their batches."""
from dataclasses import dataclass
from typing import List, Optional, Tuple

from ..errors import InputError
from ..options import option


@dataclass(frozen=True)
class EvalDataConfig:
    """Data."""

    data_dir: Optional[str] = option(None, 'folder of the data, or a tar archive', 'DIR', may_change=True, card='never')
    dataset: str = option(
        '', "name of the data set: cifar10_lt, cifar100_lt, digits_lt, imagenet_lt, inat2018, places_lt, or one of "
        "timm's. Leave it out for your own folder, archive or lists")
    val_split: str = option('validation', 'split to evaluate on. The default also finds val, test and the like')
    val_list: Optional[str] = option(
        None, 'list of the images to evaluate on: lines of a path and a label, .csv or .tsv with a header, or a COCO '
        '.json. Paths begin in --data-dir', 'FILE', card='changed')
    input_key: Optional[str] = option(
        None, "column of the images, in tables and in timm's data sets. By default path, image, filename, file_name or "
        'file', 'COLUMN', card='changed')
    target_key: Optional[str] = option(
        None, 'column of the labels. By default label, target, class or category', 'COLUMN', card='changed')
    class_map: Optional[str] = option(
        None, 'file of class names in label order, one a line. Images of other classes are left out', 'FILE',
        card='changed')
    class_depth: Optional[int] = option(
        None, 'number of folders below the split that make up the class. By default it is found out', low=1,
        card='changed')
    class_stats: Optional[str] = option(
        None, "class counts of a training stream, in timm's format. If the file has class_names, they name the labels "
        'of streams', 'FILE', card='never')
    val_num_samples: Optional[int] = option(None, 'number of images of an evaluation stream', low=1, card='never')
    dataset_download: bool = option(
        False, 'download the data if the data set can do that', may_change=True, card='never')
    imb_factor: float = option(
        100., 'imbalance factor of the *_lt data sets: the largest class over the smallest', low=1)
    imb_type: str = option('exp', 'profile of the class counts of the *_lt data sets', choices=('exp', 'step'))
    imb_seed: Optional[int] = option(
        None, 'draw the images of a *_lt data set with this seed, as LDAM-DRW does. By default each class keeps its '
        'first images', low=0, card='changed')


@dataclass(frozen=True)
class TrainDataConfig:
    """Training data."""

    train_split: str = option('train', 'split to train on')
    train_list: Optional[str] = option(
        None, 'list of the images to train on: lines of a path and a label, .csv or .tsv with a header, or COCO .json',
        'FILE', card='changed')
    train_num_samples: Optional[int] = option(None, 'number of images of a training stream', low=1, card='never')
    holdout: float = option(
        0., 'evaluate on this share of each class of the training set, and do not train on it. If there is nothing else'
        ' to evaluate on, it is 0.2', 'SHARE', low=0, below=1, card='changed')
    group_key: Optional[str] = option(
        None, 'group of an image: a column, or a regular expression that is searched for in paths. --holdout keeps the '
        'images of a group together', 'REGEX|COLUMN', card='never')
    val_per_class: int = option(
        0, 'evaluate on the last N training images of each class of a *_lt data set. They are set aside before the '
        'long-tailed subset is cut', low=0, card='changed')


@dataclass(frozen=True)
class DataConfig(EvalDataConfig, TrainDataConfig):
    """The training data and the evaluation data."""


@dataclass(frozen=True)
class CheckConfig:
    """Checking images."""

    check_images: Optional[bool] = option(
        None, 'read all images once before anything else, and leave out those that cannot be read. By default this is '
        'done for up to 100,000 images, but for those that were read before', may_change=True, card='never')


@dataclass(frozen=True)
class PreprocessingConfig:
    """Preprocessing."""

    img_size: Optional[int] = option(
        None, "side of the images in pixels. By default the model's own", low=1, below=2 ** 14)
    input_size: Optional[List[int]] = option(
        None, 'channels, height and width of the images', nargs=3, low=1, below=2 ** 14, card='changed')
    in_chans: Optional[int] = option(None, 'channels of the images, 1 or 3', low=1, card='changed')
    exif: Optional[bool] = option(
        None, 'turn images as their EXIF orientation says. This is the default in new runs on your own images',
        card='changed')
    pixel_range: Optional[List[float]] = option(
        None, 'lowest and highest pixel value of images of more than 8 bits, which become black and white. By default '
        'those of the data type', 'X', nargs=2, card='changed')
    crop_pct: Optional[float] = option(
        None, 'share of the side that the centre crop keeps in evaluation', low=0.01, below=10, card='changed')
    mean: Optional[List[float]] = option(
        None, 'mean of each channel, of images in 0..1', nargs='+', low=-100, below=100, card='changed')
    std: Optional[List[float]] = option(
        None, 'standard deviation of each channel, of images in 0..1', nargs='+', low=1e-6, below=100, card='changed')
    interpolation: Optional[str] = option(
        None, 'interpolation in evaluation', choices=('nearest', 'bilinear', 'bicubic', 'lanczos'), card='changed')

    @property
    def channels(self) -> int:
        """Channels of the images, from `--in-chans` or `--input-size`."""
        channels = self.in_chans or (self.input_size or (3,))[0]
        if self.input_size and channels != self.input_size[0]:
            raise InputError(
                f'--in-chans {channels} contradicts the {self.input_size[0]} channels of --input-size: drop one of '
                'them.')
        if self.input_size and self.img_size:
            raise InputError(f'--input-size and --img-size {self.img_size} contradict each other: drop one of them.')
        return channels

    @property
    def image_size(self) -> Optional[Tuple[int, int]]:
        """Height and width of the images, if the options give them."""
        if self.input_size:
            return self.input_size[1], self.input_size[2]
        return (self.img_size, self.img_size) if self.img_size else None


@dataclass(frozen=True)
class SourceConfig(DataConfig, CheckConfig, PreprocessingConfig):
    """The data of a run or an evaluation, and how its images are read."""


@dataclass(frozen=True)
class LoaderConfig:
    """Batches."""

    batch_size: int = option(128, 'images in a training batch of each process', low=1, flags=('-b',))
    grad_accum_steps: int = option(1, 'batches whose gradients are added up for a step', low=1, card='changed')
    validation_batch_size: Optional[int] = option(
        None, 'images in an evaluation batch. By default --batch-size', low=1, flags=('-vb',), may_change=True,
        card='never')
    device_data: Optional[bool] = option(
        None, 'keep the data on the device and augment it there, instead of in worker processes. By default this is '
        'done if the data set (*_lt, torch/cifar*) and the augmentation allow it', card='changed')
