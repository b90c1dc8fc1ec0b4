"""SHIKE for timm: importing this package registers its models with `timm.create_model`.

The functions take the options of the commands as keyword arguments. They raise a ValueError if an option is unknown or
cannot work. In that case they have written nothing.
"""
from typing import Any, Dict, Iterator, Union, cast

import timm

from . import models as models
from .models.backbones import Source
from .options import check_values, complete
from .version import __version__ as __version__


def shike(backbone: str, pretrained_backbone: Union[None, Source] = None, **kwargs: Any) -> models.Shike:
    """Make a SHIKE model from a network of timm. Nearly all networks of timm can be split into a trunk and experts.

    Args:
        backbone: Name of timm's network, such as 'regnety_016'.
        pretrained_backbone: Weights of the network to start from, as `Shike.load_backbone` takes them. None loads
            no weights. With such weights `fusion` is 'residual' by default.
        **kwargs: Arguments of `timm.create_model` and of `shike_timm.models.Shike`.

    Raises:
        ValueError: If the network cannot be split, or the weights do not exist; the message says why.
        RuntimeError: If timm knows no such tag, or a weight has another shape.
    """
    if pretrained_backbone:
        kwargs.setdefault('fusion', 'residual')
    model = cast(models.Shike, timm.create_model('shike', backbone=backbone, **kwargs))
    if pretrained_backbone:
        model.load_backbone(pretrained_backbone, kwargs.get('cache_dir'))
    return model


def train(**options: Any) -> Dict[str, Any]:
    """Train as `shike train` does, with its options as keyword arguments: `train(hparams='quickstart', epochs=3)`.

    Returns:
        Metrics and seconds of each stage, as in `metrics.json` of the run folder.
    """
    from .cli.train import complete_train_args
    from .training.config import TrainConfig
    from .training.runs import train
    return train(complete_train_args(check_values(TrainConfig, options, 'train()')))


def evaluate(**options: Any) -> Dict[str, Any]:
    """Evaluate as `shike eval` does, with its options as keyword arguments.

    Returns:
        The metrics of `shike_timm.metrics.evaluate`, `per_class` with `names` and `class_counts`.
    """
    from .report.evaluate import EvalConfig, complete_eval_args, evaluate_model
    return evaluate_model(complete_eval_args(check_values(EvalConfig, options, 'evaluate()')))


def describe(**options: Any) -> Dict[str, Any]:
    """Say what a data set holds as `shike describe` does, with its options as keyword arguments.

    Returns:
        The result of `shike_timm.cli.describe.describe_data`, which `--json` prints.
    """
    from .cli.describe import DescribeConfig, describe_data
    return describe_data(complete(DescribeConfig, check_values(DescribeConfig, options, 'describe()')))


def predict(inputs: Any, **options: Any) -> Iterator[Dict[str, Any]]:
    """Predict the classes of image files as `shike predict` does, with its options as keyword arguments.

    Args:
        inputs: Files, folders or patterns, or one of them.
        **options: The options of the command, except those of its output.

    Returns:
        An iterator of dictionaries, those of `shike_timm.cli.predict.predict_rows`.
    """
    from .cli.predict import RowsConfig, predict_rows
    inputs = [str(one) for one in inputs] if isinstance(inputs, (list, tuple)) else [str(inputs)]
    return predict_rows(complete(RowsConfig, check_values(RowsConfig, dict(options, inputs=inputs), 'predict()')))
