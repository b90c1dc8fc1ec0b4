"""The classifier of a plain network of timm, retrained for classes of different sizes."""
import logging
from typing import Any, Dict

from ..errors import InputError, one_line
from ..pretrained.plain import PlainModel, create_plain
from .config import RetrainConfig
from .runs import plan_retraining, prepare

_logger = logging.getLogger(__name__)


def rebalance(config: RetrainConfig, plain: PlainModel) -> Dict[str, Any]:
    """Retrain the classifier of a plain network: a model of one expert without fusion, in a run folder of its own.

    Returns and raises as `train`. The metrics `before` are those of the network's own classifier, if it has the classes
    of the data.
    """
    config, phase, device = plan_retraining(config)
    trainer = prepare(config, [phase], device, False)
    net = create_plain(plain, config.channels, trainer.data.class_names)
    try:
        trainer.model.load_backbone(plain.weights)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint '{plain.name}' cannot be split: {one_line(error)}.") from error
    if trainer.data.holdout:
        _logger.warning(
            f"The images to evaluate on are held out of the training images, but '{plain.name}' may have learnt from "
            'them: both accuracies may be too high. Give the split that it was evaluated on, where there is one.')
    if net is None:
        _logger.info(f"'{plain.name}' has other classes than the data, so there are no metrics before.")
    else:
        trainer.before['before'] = trainer.evaluate(net.to(device))
    del net
    return trainer.train()
