"""What tests of images on disk ask of loaded data."""
import torch
from timm.data import resolve_data_config

from shike_timm.data import load_training_data

CPU = torch.device('cpu')
# The smallest run on images of one's own.
RUN = [
    '--model', 'resnet32_shike', '--img-size', '8', '--workers', '0', '--batch-size', '4', '--epochs', '2',
    '--warmup-epochs', '0', '--crt-epochs', '1', '--device', 'cpu', '--lr', '0.05', '--experiment', 'run',
    '--no-aug',
]


def load(root, **options):
    return load_training_data('', str(root), **options)


def names_of(data):
    return [data.dataset.filename(i) for i in range(len(data.dataset))]


def labels_of(data):
    return {data.dataset.filename(i): data.class_names[target] for i, target in enumerate(data.dataset.targets)}


def loader_config():
    return dict(resolve_data_config(dict(img_size=8)), mean=(0.,) * 3, std=(1.,) * 3)
