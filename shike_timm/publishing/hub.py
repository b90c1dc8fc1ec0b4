"""Publishing to the Hugging Face Hub, in one commit. Everything is checked before the first request."""
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..errors import InputError, one_line
from ..files import spreadsheet_cell
from ..options import option
from ..pretrained.folder import find_model, read_config
from ..pretrained.load import load_trained_model
from ..training.folder import read_args, read_metrics
from .card import model_card
from .export import find_place

REPORT_TABLE = 'classes.csv'
REPORT_FILES = ('class_counts.png', 'class_accuracy.png', REPORT_TABLE)
WORST = ('class', 'training images', 'test images', 'ensemble', 'most confused with')


@dataclass(frozen=True)
class PublishConfig:
    """Publishing."""

    model: str = option(
        None, 'run folder of shike train, or a model folder such as RUN/model', 'RUN', positional=True)
    repo_id: str = option(None, 'name on the Hub', 'USER/NAME', required=True)
    private: bool = option(False, 'make the repository private')
    update: bool = option(False, 'replace what is already published under the name')
    dry_run: Optional[str] = option(
        None, 'do not publish, but write the card and all files to this new folder', 'FOLDER')
    report: Optional[str] = option(
        None, 'folder that shike report wrote for the model. Two of its figures and the table of classes are published '
        'with the card. By default RUN/report, if it exists', 'DIR')
    license: Optional[str] = option(
        None, "license on the card, such as mit. By default the license of the backbone's weights", 'ID')


def read_run(model_folder: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Metrics and arguments of the run that wrote a model folder, {} and {} if the folder is not in a run folder."""
    model_folder = model_folder.resolve()
    if model_folder.name != 'model':
        return {}, {}
    return read_metrics(model_folder.parent), read_args(model_folder.parent)


def find_report(
        folder: Optional[str], model_folder: Path, config: Dict[str, Any], result: Dict[str, Any],
) -> Tuple[List[Path], Optional[List[List[str]]]]:
    """Find the model's report, in `folder` or in RUN/report, and return its files to publish and its worst classes."""
    model_folder = model_folder.resolve()
    report = Path(folder) if folder else model_folder.with_name('report')
    table = report / REPORT_TABLE
    if folder is None and not (model_folder.name == 'model' and table.is_file()):
        return [], None
    paths = [report / name for name in REPORT_FILES]
    for path in paths:
        if not path.is_file():
            raise InputError(f"'{path}' does not exist: give --report the folder that shike report wrote.")
    try:
        with table.open(newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        counts = {spreadsheet_cell(row['class']): int(row['training images']) for row in rows}
        correct = sum(float(row['ensemble']) * int(row['test images']) for row in rows if row['ensemble'])
        top1 = correct / max(sum(int(row['test images']) for row in rows), 1)
        worst = [row for row in rows if float(row['ensemble'] or 100) < 100]
        worst.sort(key=lambda row: (float(row['ensemble']), -int(row['test images'])))
        cells = [[str(row[key]).replace('|', '\\|') for key in WORST] for row in worst[:5]]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"'{table}' is damaged ({one_line(error)}): make the report again.") from error
    names, problem = config.get('label_names'), None
    if names and config.get('class_counts') and counts != dict(
            zip(map(spreadsheet_cell, names), config['class_counts'])):
        problem = 'its classes or their training images are not those of the model'
    # Two devices differ by less than this. The two stages of training differ by far more.
    elif abs(result.get('top1', top1) - top1) > 0.5:
        problem = f"its top-1 is {top1:.2f} and that of the run {result['top1']:.2f}"
    if problem:
        raise InputError(f"'{report}' is of another model, as {problem}: make it again, or move it away.")
    return paths, cells


def _explain(error: BaseException, repo_id: str, endpoint: str) -> Exception:
    """Convert any error of huggingface_hub to an error with one sentence of explanation."""
    if isinstance(error, OfflineModeIsEnabled):
        return InputError('HF_HUB_OFFLINE is set, which forbids every request to the Hub: unset it to publish.')
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # Errors of an upload are wrapped in others.
    status, reason = 0, one_line(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = f'{status}: {one_line(error.server_message or error.response.reason_phrase)}'
    known = {
        401: f"The Hub refused the token ({reason}): give one that may write by 'hf auth login --force' or HF_TOKEN.",
        403: f"The Hub does not let this token write to '{repo_id}' ({reason}): choose a --repo-id of your own, "
             'a token that may write there, or free some storage.',
        404: f"'{repo_id}' is taken, or this token cannot see it ({reason}): choose another --repo-id.",
    }
    if status in known:
        return InputError(known[status])
    return OSError(
        f'Publishing to {endpoint} failed ({reason}): look at {endpoint}/{repo_id} to see what has been '
        'uploaded, and repeat the command later.')


def _prepare_repo(api: HfApi, config: PublishConfig, card: ModelCard) -> Optional[str]:
    """Let the Hub check the card, create the repository, and return its newest commit."""
    try:
        card.validate()  # The Hub checks the card before the repository is made.
    except ValueError as error:
        raise InputError(
            f'The Hub does not accept the metadata of the card ({one_line(error)}): check that --license is one of its '
            'identifiers, such as mit.') from error
    # With None, the visibility is the default of the organisation.
    api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
    info = api.model_info(config.repo_id)
    # An earlier attempt that failed before its commit may have left .gitattributes.
    if not config.update and {file.rfilename for file in info.siblings or []} - {'.gitattributes'}:
        raise InputError(
            f"'{config.repo_id}' already holds files: add --update to replace them, or choose another --repo-id.")
    if config.private and not info.private:
        raise InputError(
            f"'{config.repo_id}' exists and is public: make it private in its settings there, or leave out --private.")
    return info.sha


def publish(config: PublishConfig) -> str:
    """Publish a model with its card and return its URL. For a dry run, write both to a folder and return its name."""
    if config.dry_run:
        find_place(Path(config.dry_run))
    try:
        validate_repo_id(config.repo_id)
        if '/' not in config.repo_id:
            raise HFValidationError('it does not have the form USER/NAME')
    except HFValidationError as error:
        raise InputError(
            f"--repo-id '{config.repo_id}' cannot be a name on the Hub ({one_line(error)}): choose another.") from error
    folder = find_model(config.model)
    metrics, run_args = read_run(folder)
    model = load_trained_model(f'local-dir:{folder}').model
    model_config = read_config(f'local-dir:{folder}')
    model_config.get('model_args', {}).pop('pretrained_backbone', None)  # The value may be a path of this machine.
    report, worst = find_report(config.report, folder, model_config, list(metrics.values())[-1] if metrics else {})
    card = model_card(
        config.repo_id, model, model_config, metrics, run_args, config.license, worst=worst)
    files: Dict[str, Any] = {
        WEIGHTS_FILE: folder / WEIGHTS_FILE, CONFIG_FILE: json.dumps(model_config, indent=2).encode(),
        'README.md': str(card).encode(), **{path.name: path for path in report}}
    if not report:
        print(f"The card says no worst classes and has no figures: 'shike report {config.model}' makes them.")
    if config.dry_run:
        output = Path(config.dry_run)
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        print(f"{config.dry_run} - holds what would be published as '{config.repo_id}': {', '.join(files)}")
        return config.dry_run
    if not re.fullmatch('[!-~]+', get_token() or ''):  # An error about other characters would show the token.
        raise InputError(
            "There is no token for the Hub, or it is not valid: log in with 'hf auth login --force', or set "
            'HF_TOKEN.')

    hub_logging.set_verbosity_error()  # This keeps every attempt out of the log.
    disable_progress_bars()
    api = HfApi()
    url = f'{api.endpoint}/{config.repo_id}'
    try:
        parent = _prepare_repo(api, config, card)
        print(f'Uploading {(folder / WEIGHTS_FILE).stat().st_size / 1e6:.1f} MB to {url}', flush=True)
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(
            config.repo_id, additions, commit_message='Publish model with shike-timm', parent_commit=parent)
    except InputError:
        raise
    except Exception as error:  # huggingface_hub can raise any error.
        raise _explain(error, config.repo_id, api.endpoint) from error
    print(
        f"{url} - load it with: import shike_timm, timm; "
        f"timm.create_model('hf-hub:{config.repo_id}', pretrained=True)")
    return url
