"""The classifier of a plain network of timm, retrained for classes of different sizes."""
import logging
from dataclasses import replace
from typing import Any, Dict

from ..distributed import join_processes
from ..errors import InputError, one_line
from ..pretrained.plain import PlainModel, create_plain
from .config import RetrainConfig
from .phases import plan_phases
from .runs import default_experiment, prepare

_logger = logging.getLogger(__name__)


def rebalance(config: RetrainConfig, plain: PlainModel) -> Dict[str, Any]:
    """Retrain the classifier of a plain network: a model of one expert without fusion, in a run folder of its own.

    Returns:
        Metrics by stage: `before`, those of the network's own classifier where it has the classes of the data, and
        `stage_two`. `metrics.json` holds them too.

    Raises:
        InputError: If anything given cannot work. Nothing has been written then.
        Interrupted: If a signal stopped the run.
        NonFiniteError: If the loss or the weights stopped being finite.
    """
    device = join_processes(config.device)
    phase = plan_phases(config, retraining=True)[-1]
    config = replace(
        config, crt_epochs=phase.epochs, experiment=config.experiment or f'{default_experiment(config)}-crt')
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
