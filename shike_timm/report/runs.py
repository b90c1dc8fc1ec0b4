"""Makes a report of runs and of files with saved logits, for `shike report`."""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from torch import Tensor

from ..checkpoints import load_checkpoint
from ..data import create_eval_loader, load_eval_data, load_training_data
from ..devices import DeviceConfig, resolve_device
from ..errors import InputError
from ..metrics import evaluate
from ..models.create import resolve_data_config
from ..options import option
from ..pretrained.load import from_checkpoint
from ..training.folder import read_args
from ..training.phases import PHASES
from ..training.resume import saved_config
from .cam import CamConfig, draw_cams
from .logits import SavedLogits, check_report, collect, count_gmacs, load_logits


@dataclass(frozen=True)
class ReportOutputConfig:
    """Report."""

    runs: List[str] = option(
        None, 'run folders or files of shike eval --save-logits. A run is evaluated on its own data. The report '
        'describes the first one in detail and compares the others with it', 'RUN|FILE.npz', nargs='+',
        required=True, positional=True)
    output: Optional[str] = option(
        None, 'folder to write report.html, its figures and the table of the classes to. By default RUN/report for a '
        'single run, and report for several', 'DIR')
    data_dir: Optional[str] = option(None, 'folder of the data, if it has moved since the runs', 'DIR')
    batch_size: int = option(256, 'images in a batch', low=1, flags=('-b',))


@dataclass(frozen=True)
class ReportConfig(ReportOutputConfig, CamConfig, DeviceConfig):
    """All options of shike report."""


def evaluate_run(run: Path, config: ReportConfig, draws: bool) -> Tuple[List[SavedLogits], List[Dict[str, Any]]]:
    """Logits of each stage of a run on its evaluation split, last stage first, and its maps if `draws` is true."""
    checkpoints = [run / phase / 'last.pth.tar' for phase in PHASES if (run / phase / 'last.pth.tar').exists()]
    if not checkpoints:
        raise InputError(f"'{run}' holds no checkpoint of a run: give a run folder of shike train.")
    device = resolve_device(config.device)
    saved: List[SavedLogits] = []
    data, cams = None, []
    given = dict(data_dir=config.data_dir) if config.data_dir else {}
    for path in reversed(checkpoints):
        checkpoint = load_checkpoint(path)
        trained = from_checkpoint(checkpoint, str(path))
        model, names = trained.model.to(device), trained.class_names
        assert trained.class_counts is not None  # Every checkpoint of a run has them.
        run_config = replace(saved_config(checkpoint, path, given), **given)
        loading = run_config.workers, run_config.batch_size, run_config.seed
        if data is None and (run_config.holdout or run_config.val_per_class):  # Evaluate on held-out images.
            data = load_training_data(run_config, names, trained.run_folder, *loading).test
        elif data is None:
            data = load_eval_data(run_config, names, model.in_chans, trained.run_folder, *loading)
        data_config = resolve_data_config(run_config, model)
        if config.cam and draws and not saved:
            cams = draw_cams(
                model, config.cam, data_config, names, exif=run_config.exif, pixel_range=run_config.pixel_range)
        loader = create_eval_loader(data, data_config, config.batch_size, device, config.workers)
        kept: List[Tuple[Tensor, Tensor]] = []
        evaluate(model, loader, trained.class_counts, device, kept=kept)
        name = run.name if not saved else f"{run.name}, {path.parent.name.replace('_', ' ')}"
        costs = [] if saved else count_gmacs(model, next(iter(loader))[0][:1])
        saved.append(collect(trained, data, kept, run_config, name=name, run=run, costs=costs))
    return saved, cams


def make_report(config: ReportConfig) -> Path:
    """Write the report of runs and files. Returns the path of the page."""
    single = len(config.runs) == 1 and Path(config.runs[0]).is_dir()
    output = config.output or (str(Path(config.runs[0], 'report')) if single else 'report')
    check_report(output, config.cam)
    if config.cam and not Path(config.runs[0]).is_dir():
        raise InputError(f"--cam needs a model, but '{config.runs[0]}' has none: give a run folder, or use shike eval.")
    for path in map(Path, config.runs):
        read_args(path if path.is_dir() else path.parent)  # A damaged file raises its error before the work.
    from .analysis import Analysis
    from .page import write_report
    models, earlier, cams = [], None, []
    for path in map(Path, config.runs):
        if path.is_dir():
            saved, drawn = evaluate_run(path.absolute(), config, draws=not models)
            cams += drawn
        else:
            saved = [load_logits(path)]
        if not models and len(saved) > 1:
            earlier = Analysis(saved[1])
        models.append(Analysis(saved[0]))
    page = write_report(Path(output), models, earlier, cams)
    print(f'Report: {page}')
    return page
