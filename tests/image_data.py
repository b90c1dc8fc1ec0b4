"""What tests of images on disk ask of loaded data."""
import torch
from timm.data import resolve_data_config

from shike_timm.data import SourceConfig, load_eval_data, load_training_data

CPU = torch.device('cpu')
# The smallest run on images of one's own.
RUN = [
    '--model', 'resnet32_shike', '--img-size', '8', '--workers', '0', '--batch-size', '4', '--epochs', '2',
    '--warmup-epochs', '0', '--crt-epochs', '1', '--device', 'cpu', '--lr', '0.05', '--experiment', 'run',
    '--no-aug',
]


CONTEXT = ('class_names', 'in_chans', 'run_folder', 'batch_size')  # what a configuration does not have


def load_named(name, root=None, **options):
    """Training data by the name of its set."""
    context = {key: options.pop(key) for key in CONTEXT if key in options and key != 'in_chans'}
    return load_training_data(SourceConfig(dataset=name, data_dir=root and str(root), **options), **context)


def load_evaluation(name, root=None, **options):
    """An evaluation split by the name of its set."""
    context = {key: options.pop(key) for key in CONTEXT if key in options}
    return load_eval_data(SourceConfig(dataset=name, data_dir=root and str(root), **options), **context)


def load(root, **options):
    return load_named('', root, **options)


def names_of(data):
    return data.filenames()


def labels_of(data):
    return {data.filename(i): data.class_names[target] for i, target in enumerate(data.targets)}


def loader_config():
    return dict(resolve_data_config(dict(img_size=8)), mean=(0.,) * 3, std=(1.,) * 3)
