"""The card of a published model. Every number on the card comes from the files of the run."""
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import find_dataset
from ..data.config import DataConfig
from ..data.decode import MODES
from ..metrics import SHOTS, ShotConfig, shot_divisions
from ..models import Shike
from ..options import checked, options
from ..training.config import TeacherConfig, card_options

TEMPLATE = Path(__file__).with_name('card.md.jinja')
METRIC_NAMES = {
    'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy', 'balanced': 'Balanced accuracy',
    **{shot: f'{shot.capitalize()}-shot accuracy' for shot in SHOTS}}
PATHS = {  # Options that may name files or folders.
    'class_map', 'initial_checkpoint', 'kd_model_name', 'pretrained_backbone', 'train_list', 'train_split', 'val_list',
    'val_split',
}


def _without_folder(name: str) -> str:
    """Shorten a path to its last part, or a local-dir to RUN/model, since a card must not show private folders."""
    source, _, path = name.partition(':')
    if source.lower() in ('hf-hub', 'hf_hub'):
        return name
    is_model = source.lower() == 'local-dir'
    parts = [part for part in re.split(r'[/\\]', path if is_model else name) if part]
    return f'local-dir:{"/".join(parts[-2:])}' if is_model else ''.join(parts[-1:])


def _dataset(name: str) -> str:
    """The name of a data set. If it names a folder, as `hfds//home/me/photos` does, only the last part is kept."""
    prefix, _, rest = name.partition('/')
    # Names on the Hub have one slash.
    is_path = re.match(r'[/.~]|[A-Za-z]:', rest) or len(re.findall(r'[/\\]', rest)) > 1
    return f'{prefix}/{_without_folder(rest)}' if is_path else name


def _data_name(args: Dict[str, Any]) -> str:
    name = args.get('dataset')
    if name and find_dataset(name).has_imb_factor:
        data = checked(DataConfig, args)
        return f'{name}, imbalance factor {data.imb_factor:g} ({data.imb_type})'
    return name or 'a folder of images'


def _split(args: Dict[str, Any]) -> str:
    if args.get('holdout'):
        return f"{args['holdout']:g} of the training set"
    if args.get('val_per_class'):
        return f"{args['val_per_class']} training images of each class"
    return find_dataset(args.get('dataset') or '').eval_split or re.split(r'[/\\]', args.get('val_split', ''))[-1]


def _eval_results(metrics: Dict[str, Any], args: Dict[str, Any]) -> List[EvalResult]:
    """The accuracies of the ensemble after the last stage of training, as the Hub takes them."""
    result = list(metrics.values())[-1]
    return [
        EvalResult(
            task_type='image-classification', dataset_type=args.get('dataset') or 'imagefolder',
            dataset_name=_data_name(args), dataset_split=_split(args), metric_type='accuracy', metric_name=label,
            metric_value=result[key])
        for key, label in METRIC_NAMES.items() if result.get(key) is not None]


def _known(config: Dict[str, Any], most: int = 20) -> str:
    """The class names, those with most training images first. If there are more than `most`, the middle is left out."""
    names, counts = config.get('label_names') or [], config.get('class_counts')
    names = [names[c] for c in sorted(range(len(names)), key=lambda c: -counts[c] if counts else c)]
    return ', '.join(names if len(names) <= most else [*names[:most // 2], '...', *names[-(most // 2):]])


def _recipe(metrics: Dict[str, Any], args: Dict[str, Any]) -> Dict[str, Any]:
    """The options of the run that matter for its model."""
    dataset = find_dataset(args.get('dataset') or '')
    unused = {'train_split', 'val_split'} if dataset.eval_split else set()
    if not dataset.has_imb_factor:
        unused |= {'imb_factor', 'imb_type'}
    if 'stage_two' not in metrics:
        unused |= {key for key in args if key.startswith('crt_')} - {'crt_epochs'}
        args = dict(args, crt_epochs=0)  # The default of some methods is not 0.
    if not args.get('kd_model_name'):
        unused |= set(options(TeacherConfig))
    recipe = {key: value for key, value in card_options(args).items() if key not in unused}
    return {key: _without_folder(value) if key in PATHS else value for key, value in recipe.items()}


def model_card(
        repo_id: str, model: Shike, config: Dict[str, Any], metrics: Optional[Dict[str, Any]] = None,
        args: Optional[Dict[str, Any]] = None, license: Optional[str] = None, load_as: Optional[str] = None,
        worst: Optional[List[List[str]]] = None,
) -> ModelCard:
    """Make a model's card from its `config.json` and its run's `metrics.json` and `args.yaml`, without private folders.

    `load_as` is the name to load the model by, if it is not on the Hub. `license` defaults to that of the pretrained
    weights that training started from. `worst` is for a card with a report's figures beside it: rows of the worst
    classes, with name, training images, test images, percent right, and the class most often predicted instead.
    """
    metrics, args, counts = metrics or {}, dict(args or {}), config.get('class_counts')
    if args.get('dataset'):
        args['dataset'] = _dataset(args['dataset'])
    name, shots = repo_id.split('/')[-1], checked(ShotConfig, args)
    data = ModelCardData(
        model_name=name if metrics else None, library_name='timm', pipeline_tag='image-classification',
        license=license or config.get('pretrained_cfg', {}).get('license'),
        tags=['image-classification', 'timm', 'long-tailed', 'shike'], metrics=['accuracy'] if metrics else None,
        eval_results=_eval_results(metrics, args) if metrics else None)
    divisions = shot_divisions(config.get('shot_counts', counts), shots) if counts else {}
    num_classes = config['num_classes']
    seen = list(metrics.values())[-1].get('balanced_classes', num_classes) if metrics else num_classes
    recipe = _recipe(metrics, args) if args else {}
    template = jinja2.Template(
        TEMPLATE.read_text(encoding='utf-8'), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined)
    return ModelCard(template.render(
        metadata=data.to_yaml(), name=name, model=model, config=config, args=args, seed=args.get('seed'),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()), data_name=_data_name(args),
        counts=counts, shots=shots, divisions={shot: int(mask.sum()) for shot, mask in divisions.items()},
        metrics=metrics, columns=list(METRIC_NAMES), known=_known(config), worst=worst,
        averaged='all' if seen == num_classes else f'{seen} of {num_classes}',
        load_as=load_as or f'hf-hub:{repo_id}', mode=MODES[model.in_chans], recipe=recipe,
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False)))
