"""Reports of runs and saved logits, put together from parsed arguments."""
import copy
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints import load_checkpoint
from ..data import ImageSet, create_eval_loader, load_eval_data
from ..data.dataset import AnySet
from ..devices import DeviceConfig, resolve_device, tune_device
from ..errors import InputError
from ..measure import count_flops
from ..metrics import MOST_EXPERTS, all_subsets, evaluate, shot_numbers
from ..models import Shike
from ..options import checked, option, parse
from ..pretrained.load import TrainedModel, load_trained_model
from ..report.logits import SavedLogits, load_logits
from ..training.build import load_data, resolve_data_config
from ..training.config import TrainConfig
from ..training.methods import STAGES
from .script import run_script


@dataclass(frozen=True)
class CamConfig:
    """Class activation maps."""

    cam: Optional[List[str]] = option(
        None, 'image files, folders or patterns, of which the report shows where each expert looks', 'IMAGE',
        nargs='+')


@dataclass(frozen=True)
class ReportOutputConfig:
    """Report."""

    runs: List[str] = option(
        None, 'run folders, which are evaluated on the data of the run, or files of shike eval --save-logits; the '
        'first is told of at length, the others are compared with it', 'RUN|FILE.npz', nargs='+', required=True,
        positional=True)
    output: str = option('report', 'folder to write report.html, its figures and the table to', 'DIR')
    data_dir: Optional[str] = option(None, 'folder of the data, where it is not where the runs had it', 'DIR')
    batch_size: int = option(256, 'images a batch', low=1, flags=('-b',))


@dataclass(frozen=True)
class ReportConfig(ReportOutputConfig, CamConfig, DeviceConfig):
    """All options of shike report."""


def check_report(folder: str, cam: Optional[Sequence[str]] = None) -> None:
    """Check that a report can be drawn and written, before the work that it is of.

    Args:
        folder: Where to.
        cam: Images for `--cam`.

    Raises:
        InputError: If a package is missing, or the folder is a file.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        if cam:
            import pytorch_grad_cam  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"A report needs {error.name}: pip install 'shike-timm[report]'.") from error
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"'{folder}', where the report is to go, is a file: give the name of a folder.")


def _images(data: AnySet, number: int) -> Tuple[List[str], Optional[Callable[[int], Image.Image]]]:
    """Paths, or else indices, of the images that could be read, in order, and what opens one of them."""
    if not isinstance(data, ImageSet):
        return [str(i) for i in range(number)], None  # a stream need not be as long as it says
    read = (~data.unreadable).nonzero()[:, 0].tolist()
    root = os.path.abspath(data.source.root) if data.has_paths else ''
    return [os.path.join(root, data.filename(i)) for i in read], lambda i: data.read(read[i])


def collect(
        trained: TrainedModel,
        data: AnySet,
        kept: Sequence[Tuple[Tensor, Tensor]],
        shots: np.ndarray,
        **fields: Any,
) -> SavedLogits:
    """What an evaluation kept, with what is known of the images and classes.

    Args:
        trained: The model; its class counts must be known.
        data: What it was evaluated on.
        kept: What `shike_timm.metrics.evaluate` keeps.
        shots: What `shike_timm.metrics.shot_numbers` gives.
        **fields: Further fields of `SavedLogits`.
    """
    logits, targets = (torch.cat(one).numpy() for one in zip(*kept))
    names = trained.class_names or data.class_names or [str(c) for c in range(logits.shape[2])]
    paths, open_image = _images(data, len(targets))
    return SavedLogits(
        logits, targets, paths, names, np.array(trained.class_counts), shots, open_image=open_image, **fields)


@torch.inference_mode()
def count_costs(model: Shike, image: Tensor, passes: int = 1) -> List[Dict[str, Any]]:
    """GMACs of every choice of up to four experts on an image [1, in_chans, H, W], as `--expert-subsets` tells them.

    Args:
        model: The model.
        image: The image.
        passes: How often the model sees each image, 2 with `--flip`.
    """
    costs = []
    for subset in all_subsets(model.num_experts) if model.num_experts <= MOST_EXPERTS else ():
        reduced = copy.deepcopy(model).eval()
        reduced.set_experts(subset)
        costs.append(dict(experts=list(subset), gmacs=passes * count_flops(partial(reduced, image)) / 2e9))
    return costs


def _evaluate_run(
        run: Path,
        args: ReportConfig,
        cam: Optional[Sequence[str]],
) -> Tuple[List[SavedLogits], List[Dict[str, Any]]]:
    """Logits of the stages of a run that it has a checkpoint of, on what it was evaluated on, the last stage first.

    The second value is where the experts of that stage look on the images of `cam`.
    """
    checkpoints = [run / stage / 'last.pth.tar' for stage in STAGES if (run / stage / 'last.pth.tar').exists()]
    if not checkpoints:
        raise InputError(f"'{run}' holds no checkpoint of a run: give a run folder of train.py.")
    device = resolve_device(args.device)
    tune_device(device)
    saved: List[SavedLogits] = []
    data, looks = None, []
    for path in reversed(checkpoints):
        trained = load_trained_model(checkpoint=str(path))
        assert trained.class_counts is not None  # which checkpoints of runs have
        run_args = checked(TrainConfig, vars(load_checkpoint(path)['args']))
        run_args = replace(run_args, data_dir=args.data_dir or run_args.data_dir)
        if data is None and (run_args.holdout or run_args.val_per_class):  # or else the test split would be looked at
            data = load_data(run_args, trained.class_names, trained.run_folder).test
        if data is None:
            data = load_eval_data(
                run_args, trained.class_names, trained.model.in_chans, trained.run_folder, run_args.workers,
                run_args.batch_size, run_args.seed)
        data_config = resolve_data_config(run_args, trained.model)
        trained.model.to(device)
        if cam and not saved:
            from ..report.cam import look_at
            looks = look_at(
                trained.model, cam, data_config, trained.class_names, exif=run_args.exif,
                pixel_range=run_args.pixel_range)
        loader = create_eval_loader(data, data_config, args.batch_size, device, args.workers)
        kept: List[Tuple[Tensor, Tensor]] = []
        evaluate(trained.model, loader, trained.class_counts, device, kept=kept)
        shots = shot_numbers(trained.shot_counts or trained.class_counts, run_args)
        name = run.name if not saved else f"{run.name}, {path.parent.name.replace('_', ' ')}"
        costs = [] if saved else count_costs(trained.model, next(iter(loader))[0][:1])
        saved.append(collect(trained, data, kept, shots, name=name, run=run, costs=costs))
    return saved, looks


def make_report(args: ReportConfig) -> Path:
    """Write the report of the runs and files that the arguments name, and give the path of the page.

    Raises:
        InputError: If anything given cannot work; nothing has been written then.
    """
    check_report(args.output, args.cam)
    if args.cam and not Path(args.runs[0]).is_dir():
        raise InputError(f"--cam needs a model, which '{args.runs[0]}' lacks: give a run folder, or use shike eval.")
    models, earlier, looks = [], None, []
    from ..report.analysis import judge
    from ..report.page import write_report
    for number, path in enumerate(map(Path, args.runs)):
        if path.is_dir():
            saved, looked = _evaluate_run(path.absolute(), args, None if number else args.cam)
            looks += looked
        else:
            saved = [load_logits(path)]
        models.append(judge(saved[0]))
        if not number and len(saved) > 1:
            earlier = judge(saved[1])
    page = write_report(Path(args.output), models, earlier, looks)
    print(f'Report: {page}')
    return page


parse_report_args = partial(
    parse, ReportConfig, 'Draw a report of a run, or of saved logits, and compare several.')


CONFIG = ReportConfig


def main() -> int:
    return run_script(lambda: make_report(parse_report_args()))
