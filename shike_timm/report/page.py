"""The page of a report. It needs no network. The figures and the table of classes are also written beside it."""
import base64
import csv
import io
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from ..files import spreadsheet_cell, write_text, write_whole
from ..metrics import METRICS, MOST_LISTED, SHOTS, rejection, shown_divisions, shown_metrics
from ..plotting import draw, save
from ..training.config import card_options
from ..training.folder import read_args
from ..version import __version__
from .analysis import Analysis, costly_confusions, paired_test, same_images, wilson
from .figures import DRAWINGS, compare_models, shorten


def class_table(analysis: Analysis) -> Tuple[List[str], List[List[Any]]]:
    """Header and rows of the table of classes. Empty cells are None."""
    saved = analysis.saved
    percent = 100 * np.stack([analysis.accuracy, *wilson(analysis.right_by_class, analysis.total[:, None])], axis=2)
    header = ['class', 'shot', 'training images', 'test images']
    for name in ['ensemble', *(f'expert {m}' for m in range(saved.num_experts))]:
        header += [name, f'{name} low', f'{name} high']
    per_class, rows = analysis.metrics['per_class'], []
    for c in analysis.order:
        predicted, count = analysis.most_confused[c] or (None, None)
        rows.append([
            saved.class_names[c], SHOTS[saved.shots[c]], int(saved.class_counts[c]), int(analysis.total[c]),
            *(None if np.isnan(value) else round(value, 2) for value in percent[c].ravel().tolist()),
            per_class['precision'][c], per_class['f1'][c],
            None if predicted is None else saved.class_names[predicted], count])
    return [*header, 'precision', 'F1', 'most confused with', 'how often'], rows


def _data_uri(image: Image.Image, size: int) -> str:
    image = image.convert('RGB')
    image.thumbnail((size, size))
    buffer, kind = io.BytesIO(), 'png' if image.width <= 32 else 'jpeg'
    image.save(buffer, kind)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def seed_groups(models: Sequence[Analysis]) -> List[Tuple[List[Analysis], Dict[str, Tuple[float, float]]]]:
    """Runs on the same images that differ only in their seed, with mean and standard deviation of each metric."""
    groups: Dict[str, List[Tuple[Analysis, Any]]] = {}
    for one in models:
        values = read_args(one.saved.run) if one.saved.run else {}
        if values:
            recipe = yaml.safe_dump(dict(card_options(values), seed=None))
            groups.setdefault(recipe, []).append((one, values.get('seed')))
    found = []
    for group in groups.values():
        members, seeds = [one for one, _ in group], {seed for _, seed in group}
        first, *others = [one.saved for one in members]
        if len(seeds) == len(members) > 1 and all(
                same_images(first, one) and np.array_equal(first.class_counts, one.class_counts) for one in others):
            columns = {key: [one.metrics[key] for one in members] for key in (*METRICS, 'macro_f1')}
            found.append((members, {
                key: (statistics.mean(values), statistics.stdev(values))
                for key, values in columns.items() if None not in values}))
    return found


def _compare(first: Analysis, second: Analysis) -> Dict[str, Any]:
    """Tests of two models by shot division, and the classes that gain and lose most."""
    if not same_images(first.saved, second.saved):
        return dict(first=first, second=second, tests=None)
    gain = 100 * (second.accuracy[:, 0] - first.accuracy[:, 0])
    order = np.argsort(np.nan_to_num(gain), kind='stable')
    names = first.saved.class_names
    return dict(
        first=first, second=second, tests=paired_test(first, second),
        lost=[(names[c], gain[c]) for c in order[:8] if gain[c] < 0],
        won=[(names[c], gain[c]) for c in order[::-1][:8] if gain[c] > 0])


def write_report(
        folder: Path, models: Sequence[Analysis], earlier: Optional[Analysis] = None,
        cams: Sequence[Dict[str, Any]] = (),
) -> Path:
    """Write `report.html`, `classes.csv` and each figure as SVG and PNG. Returns the path of the page.

    The report describes the first model in detail and compares the others with it. `earlier` is stage one of the first
    model. Figures compare the first model with `earlier`, or else with the second model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    analysis, other = models[0], earlier or (models[1] if len(models) > 1 else None)
    figures = {}
    for name, function in DRAWINGS.items():
        figure, reason = draw(function, analysis, other)
        figures[name] = dict(svg=Markup(save(figure, folder / name)), missing=reason)
    comparison = None
    for old in folder.glob('comparison.*'):  # An earlier report may have compared other models.
        old.unlink()
    if len(models) > 1:
        figure, _ = draw(compare_models, models)
        comparison = Markup(save(figure, folder / 'comparison'))
    header, rows = class_table(analysis)
    with write_whole(folder / 'classes.csv') as file:
        csv.writer(file).writerows([header, *(map(spreadsheet_cell, row) for row in rows)])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    environment.filters.update(shorten=shorten, data_uri=_data_uri, open=analysis.saved.image)
    text = environment.get_template('page.html').render(
        rejection=rejection(analysis.metrics['reject'], known=analysis.saved.reject_threshold is not None),
        version=__version__, analysis=analysis, saved=analysis.saved, models=models,
        metrics=shown_metrics(one.metrics for one in models),
        shares=['top1', 'balanced', 'macro_f1', *shown_divisions(one.metrics for one in models)],
        figures=figures, comparison=comparison,
        pairs=[_compare(*pair) for pair in combinations(models, 2)], seeds=seed_groups(models),
        confusions=costly_confusions(analysis), cams=cams,
        table=dict(header=header, rows=rows), most_listed=MOST_LISTED)
    write_text(folder / 'report.html', text)
    return folder / 'report.html'
