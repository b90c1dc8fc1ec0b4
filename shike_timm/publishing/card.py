"""The card of a published model, every number of which comes from the files of its run."""
import re
from typing import Any, Dict, List, Optional

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data import find_dataset
from ..data.decode import MODES
from ..metrics import METRICS, ShotConfig, shot_divisions
from ..models import Shike
from ..options import options
from ..training.config import TeacherConfig, card_options

__all__ = ['model_card']

METRIC_NAMES = {
    'top1': 'Top-1 accuracy',
    'top5': 'Top-5 accuracy',
    'balanced': 'Balanced accuracy',
    'many': 'Many-shot accuracy',
    'medium': 'Medium-shot accuracy',
    'few': 'Few-shot accuracy',
}
PATHS = {  # options that are files or folders, or can be
    'class_map', 'initial_checkpoint', 'kd_model_name', 'pretrained_backbone', 'train_list', 'train_split', 'val_list',
    'val_split',
}
STAGE_NAMES = {'stage_one': 'one', 'stage_two': 'two'}

CITATION = """@inproceedings{jin2023shike,
  title     = {Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation},
  author    = {Jin, Yan and Li, Mengke and Lu, Yang and Cheung, Yiu-ming and Wang, Hanzi},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}"""


def _table(header: List[str], rows: List[List[Any]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, cells)) + ' |' for cells in lines)


def _data_name(args: Dict[str, Any]) -> str:
    name = args.get('dataset')
    if not name:
        return 'a folder of images'
    if find_dataset(name).has_imb_factor:
        return f"{name}, imbalance factor {args['imb_factor']:g} ({args['imb_type']})"
    return name


def _split(args: Dict[str, Any]) -> str:
    if args.get('holdout'):
        return f"{args['holdout']:g} of the training set"
    if args.get('val_per_class'):
        return f"{args['val_per_class']} training images of each class"
    return find_dataset(args.get('dataset') or '').eval_split or re.split(r'[/\\]', args.get('val_split', ''))[-1]


def _eval_results(metrics: Dict[str, Any], args: Dict[str, Any]) -> List[EvalResult]:
    """The ensemble's accuracies after the last stage."""
    name = args.get('dataset') or 'imagefolder'
    result = list(metrics.values())[-1]
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=name,
            dataset_name=_data_name(args),
            dataset_split=_split(args),
            metric_type='accuracy',
            metric_name=label,
            metric_value=result[key],
        )
        for key, label in METRIC_NAMES.items() if result.get(key) is not None
    ]


def _data_section(config: Dict[str, Any], args: Dict[str, Any]) -> str:
    counts = config.get('class_counts')
    rows = [['data set', _data_name(args)]] if args else []
    rows.append(['classes', config['num_classes']])
    if counts:
        many, few = args.get('many_shot', 100), args.get('few_shot', 20)
        divisions = {shot: int(mask.sum()) for shot, mask in shot_divisions(
            config.get('shot_counts', counts), ShotConfig(many, few)).items()}
        rows += [
            ['training images', sum(counts)],
            ['images of the largest class', max(counts)],
            ['images of the smallest class', min(counts)],
            [f'many-shot classes (more than {many} images)', divisions['many']],
            [f'medium-shot classes ({few} to {many})', divisions['medium']],
            [f'few-shot classes (fewer than {few})', divisions['few']],
        ]
    return '## Training data\n\n' + _table(['', ''], rows)


def _without_folder(name: str) -> str:
    """The last part of a path, whose folder is the trainer's own, with RUN/ after local-dir; names on the Hub whole."""
    source, _, path = name.partition(':')
    if source.lower() in ('hf-hub', 'hf_hub'):
        return name
    is_model = source.lower() == 'local-dir'
    parts = [part for part in re.split(r'[/\\]', path if is_model else name) if part]
    return f'local-dir:{"/".join(parts[-2:])}' if is_model else ''.join(parts[-1:])


def _without_dataset_folder(name: str) -> str:
    """The name of a data set, of one that is a folder of files, `hfds//home/me/photos`, with its last part alone."""
    prefix, _, rest = name.partition('/')
    is_path = re.match(r'[/.~]|[A-Za-z]:', rest) or len(re.findall(r'[/\\]', rest)) > 1  # the Hub has USER/NAME
    return f'{prefix}/{_without_folder(rest)}' if is_path else name


def _recipe_section(metrics: Dict[str, Any], args: Dict[str, Any]) -> str:
    if not args:
        return ''
    entry = find_dataset(args.get('dataset') or '')
    unused = {'train_split', 'val_split'} if entry.eval_split else set()
    if not entry.has_imb_factor:
        unused |= {'imb_factor', 'imb_type'}
    if 'stage_two' not in metrics:
        unused |= {key for key in args if key.startswith('crt_')} - {'crt_epochs'}
        args = dict(args, crt_epochs=0)  # not every method's default
    if not args.get('kd_model_name'):
        unused |= set(options(TeacherConfig))
    recipe = {key: value for key, value in card_options(args).items() if key not in unused}
    for key in PATHS & set(recipe):
        recipe[key] = _without_folder(recipe[key])
    taught = ', `kd_model_name` is the teacher' if 'kd_model_name' in recipe else ''
    return (
        "## Recipe\n\nOptions of shike-timm's `train.py`; names with `crt_` are of stage two, `alpha` and `beta` weigh "
        f'the distillation terms{taught}.\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```'
    )


def _results_section(metrics: Dict[str, Any], num_classes: int) -> str:
    title = '## Results\n\n'
    if not metrics:
        return title + 'No metrics are at hand for this model: evaluate it before use.'
    keys = [key for key in METRICS if key in METRIC_NAMES]
    rows = []
    for stage, result in metrics.items():
        outputs = {'ensemble': result, **{f'expert {m}': expert for m, expert in enumerate(result['experts'])}}
        for name, output in outputs.items():
            cells = ['-' if output.get(key) is None else f'{output[key]:.2f}' for key in keys]
            rows.append([STAGE_NAMES.get(stage, stage), name, *cells])
    seen = list(metrics.values())[-1].get('balanced_classes', num_classes)
    over = 'all' if seen == num_classes else f'{seen} of {num_classes}'
    unseen = '' if seen == num_classes else '; the other classes have no images there'
    return title + (
        f'Percent on the evaluation split, after the last epoch of each stage; balanced averages over {over} classes, '
        f'many, medium and few over those of that division{unseen}.\n\n'
        + _table(['stage', 'output', 'top-1', 'top-5', 'balanced', 'many', 'medium', 'few'], rows)
    )


CLASSES_SECTION = """## Every class

![Training images of each class, by shot division](class_counts.png)

![Accuracy of each class: above the ensemble, below the best single expert in its colour](class_accuracy.png)

[classes.csv](classes.csv) has the accuracy of every class with its 95 % interval, and what it is most often taken for.
"""


def _usage_section(load_as: str, mode: str, has_labels: bool) -> str:
    label = "\nlabel = model.pretrained_cfg['label_names'][int(logits.argmax())]" if has_labels else ''
    return f"""## Use

With the package shike-timm installed, which registers the architecture in timm:

```python
import shike_timm, timm, torch
from PIL import Image

model = timm.create_model('{load_as}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
images = transform(Image.open('image.png').convert('{mode}'))[None]
with torch.inference_mode():
    logits = model(images)                   # [1, num_classes], averaged over experts
    experts = model.forward_experts(images)  # [1, num_experts, num_classes]{label}
```"""


def _limits_section(config: Dict[str, Any], metrics: Dict[str, Any], args: Dict[str, Any]) -> str:
    counts = config.get('class_counts')
    lines = []
    if counts:
        lines.append(
            f'Few-shot classes were learned from few images, the smallest from {min(counts)}: the model is less sure '
            'of them and more easily wrong than its total accuracy suggests.')
    if metrics:
        seed = f", seed {args['seed']}," if args.get('seed') is not None else ''
        lines.append(
            f'The figures are of the last epoch of one run{seed} on the evaluation split; another seed gives others, '
            'and where the recipe was chosen on that split they flatter the model.')
    lines += [
        f"Every image gets one of the {config['num_classes']} classes, also one that shows none of them; the scores "
        'are not calibrated probabilities.',
        'Nothing is known of it on images unlike those it was trained on.',
        'It is not meant for decisions about people.',
    ]
    return '## Limits\n\n' + '\n'.join(f'- {line}' for line in lines)


def model_card(
        repo_id: str,
        model: Shike,
        config: Dict[str, Any],
        metrics: Optional[Dict[str, Any]] = None,
        args: Optional[Dict[str, Any]] = None,
        license: Optional[str] = None,
        load_as: Optional[str] = None,
        with_report: bool = False,
) -> ModelCard:
    """Make the card of a model.

    Args:
        repo_id: Name on the Hub, `USER/NAME`.
        model: The model.
        config: Its `config.json`.
        metrics: The run's `metrics.json`, results by stage.
        args: The run's `args.yaml`; folders in it are left out.
        license: License of the weights; where None, that of the pretrained ones they started from, if there is one.
        load_as: Name to load the model by, where it is not on the Hub.
        with_report: Whether figures and table of a report lie beside the card.

    Returns:
        The card, with the last stage's metrics of the ensemble as model-index.
    """
    metrics, args = metrics or {}, dict(args or {})
    if args.get('dataset'):
        args['dataset'] = _without_dataset_folder(args['dataset'])
    name = repo_id.split('/')[-1]
    data = ModelCardData(
        model_name=name if metrics else None,
        library_name='timm',
        license=license or config.get('pretrained_cfg', {}).get('license'),
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'long-tailed', 'shike'],
        metrics=['accuracy'] if metrics else None,
        eval_results=_eval_results(metrics, args) if metrics else None,
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    sections = [
        f'# {name}',
        f"An image classifier for long-tailed data: SHIKE (CVPR 2023) as timm model `{config['architecture']}`, "
        f'{model.num_experts} experts on a shared trunk, {num_parameters:,} parameters. Its output is the average of '
        'the experts.',
        _data_section(config, args),
        _results_section(metrics, config['num_classes']),
        CLASSES_SECTION.strip() if with_report else '',
        _usage_section(load_as or f'hf-hub:{repo_id}', MODES[model.in_chans], bool(config.get('label_names'))),
        _recipe_section(metrics, args),
        _limits_section(config, metrics, args),
        f'## Citation\n\n```bibtex\n{CITATION}\n```',
    ]
    text = '\n\n'.join(section for section in sections if section)
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}\n')
