"""The page of a report: one file that needs no network, and its figures and table beside it."""
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

from ..checkpoints import write_text
from ..metrics import METRICS, SHOTS
from ..training.config import card_options
from ..version import __version__
from .analysis import Judged, paired_test, same_images, tail_confusions, wilson
from .figures import FIGURES, compare_models, draw, save, shorten

__all__ = ['class_table', 'seed_groups', 'write_report']

THUMBNAIL, MAP = 56, 224  # pixels at most
SHARES = ('top1', 'balanced', *SHOTS)


def _rounded(values: np.ndarray) -> List[Optional[float]]:
    return [None if np.isnan(value) else round(float(value), 2) for value in values]


def class_table(judged: Judged) -> Tuple[List[str], List[List[Any]]]:
    """The header and the rows, one a class, of the table of classes; None where there is no value."""
    saved, accuracy = judged.saved, judged.accuracy
    low, high = wilson(judged.right_by_class, judged.total[:, None])
    header = ['class', 'shot', 'training images', 'test images']
    columns: List[Sequence[Any]] = []
    for k, name in enumerate(['ensemble', *(f'expert {m}' for m in range(saved.num_experts))]):
        header += [name, f'{name} low', f'{name} high']
        columns += [_rounded(100 * one[:, k]) for one in (accuracy, low, high)]
    rows = []
    for c in judged.order:
        shot = SHOTS[saved.shots[c]]
        said, count = judged.most_confused[c] or (None, None)
        rows.append([
            saved.class_names[c], shot, int(saved.class_counts[c]), int(judged.total[c]), *(one[c] for one in columns),
            None if said is None else saved.class_names[said], count])
    return [*header, 'most confused with', 'how often'], rows


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([header, *rows])


def _data_uri(image: Image.Image, size: int = THUMBNAIL) -> str:
    image = image.convert('RGB')
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, 'PNG' if image.width <= 32 else 'JPEG')
    kind = 'png' if image.width <= 32 else 'jpeg'
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _confusion_rows(judged: Judged) -> List[Dict[str, Any]]:
    names, counts = judged.saved.class_names, judged.saved.class_counts
    rows = []
    for one in tail_confusions(judged):
        images = [judged.saved.image(index) for index in one.images]
        rows.append(dict(
            true=names[one.true], predicted=names[one.predicted], count=one.count, total=int(judged.total[one.true]),
            cost=one.cost, true_count=int(counts[one.true]), predicted_count=int(counts[one.predicted]),
            images=[_data_uri(image) for image in images if image is not None]))
    return rows


def _are_seeds(group: Dict[str, List[Any]]) -> bool:
    first, *others = [one.saved for one in group['models']]
    return len(set(group['seeds'])) == len(group['seeds']) > 1 and all(
        same_images(first, one) and np.array_equal(first.class_counts, one.class_counts) for one in others)


def seed_groups(models: Sequence[Judged]) -> List[Tuple[List[Judged], Dict[str, Tuple[float, float]]]]:
    """Runs that differ in their seed alone, with mean and standard deviation of each metric.

    A recipe is left out where two of its models have the same seed, such as one run's logits saved twice, or where
    they did not see the same test images.
    """
    groups: Dict[str, Dict[str, List[Any]]] = {}
    for one in models:
        path = one.saved.run and one.saved.run / 'args.yaml'
        if path and path.exists():
            values = yaml.safe_load(path.read_text(encoding='utf-8'))
            recipe = yaml.safe_dump(dict(card_options(values), seed=None))
            group = groups.setdefault(recipe, dict(models=[], seeds=[]))
            group['models'].append(one)
            group['seeds'].append(values.get('seed'))
    return [
        (group['models'], {
            key: (statistics.mean(values), statistics.stdev(values)) for key in METRICS
            if None not in (values := [one.metrics[key] for one in group['models']])})
        for group in groups.values() if _are_seeds(group)
    ]


def _compare(first: Judged, second: Judged) -> Dict[str, Any]:
    """What the page tells of two models: tests by shot, and the classes that gain and lose most."""
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
        folder: Path,
        models: Sequence[Judged],
        earlier: Optional[Judged] = None,
        looks: Sequence[Dict[str, Any]] = (),
) -> Path:
    """Write `report.html`, `classes.csv` and each figure as SVG and PNG.

    Args:
        folder: Where to write, made if it does not exist.
        models: What the report is of, the first at length, the others beside it.
        earlier: Stage one of the first; what it is compared with in figures if there is none is the second model.
        looks: What `shike_timm.report.cam.look_at` gives of the first.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judged, other = models[0], earlier or (models[1] if len(models) > 1 else None)
    figures = []
    for name, drawing in FIGURES.items():
        figure, missing = draw(drawing.function, judged, other)
        figures.append((name, drawing, Markup(save(figure, folder / name, name)), missing))
    comparison = None
    if len(models) > 1:
        figure, _ = draw(compare_models, models)
        comparison = Markup(save(figure, folder / 'comparison', 'comparison'))
    header, rows = class_table(judged)
    _write_csv(folder / 'classes.csv', header, rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined)
    environment.filters.update(shorten=shorten, data_uri=_data_uri)
    text = environment.get_template('page.html').render(
        version=__version__, judged=judged, saved=judged.saved, models=models, metrics=METRICS, shares=SHARES,
        figures=figures, comparison=comparison, pairs=[_compare(*pair) for pair in combinations(models, 2)],
        seeds=seed_groups(models), confusions=_confusion_rows(judged), looks=looks, map_size=MAP,
        table=dict(header=header, rows=rows))
    write_text(folder / 'report.html', text)
    return folder / 'report.html'
