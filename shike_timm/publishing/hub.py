"""Publishing to the Hugging Face Hub: checked before the first request, all files in one commit."""
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ..errors import InputError, one_line
from ..options import option
from ..pretrained.folder import find_model
from ..pretrained.load import load_trained_model
from .card import model_card

__all__ = ['PublishError', 'find_report', 'publish', 'read_run']

CARD = 'README.md'
FIGURES, TABLE = ('class_counts.png', 'class_accuracy.png'), 'classes.csv'  # of a report


@dataclass(frozen=True)
class PublishConfig:
    """Publishing."""

    model: str = option(
        None, 'run folder of shike train, or a model folder such as RUN/model', 'RUN', positional=True)
    repo_id: str = option(None, 'name on the Hub', 'USER/NAME', required=True)
    private: bool = option(False, 'make the repository private')
    update: bool = option(False, 'replace what is already published there')
    report: Optional[str] = option(
        None, 'folder that shike report wrote of the model, for two of its figures and the table of classes beside '
        'the card; RUN/report if there is one', 'DIR')
    license: Optional[str] = option(
        None, "license on the card, such as mit; by default that of the backbone's weights", 'ID')


class PublishError(OSError):
    """The Hub, or the way to it, failed. The message is one sentence that says what happened and what to do."""


def read_run(model_folder: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Metrics and arguments of the run a model folder lies in; empty where there is none.

    Raises:
        InputError: If their files are damaged.
    """
    model_folder = model_folder.resolve()
    found = []
    for name, parse in (('metrics.json', json.loads), ('args.yaml', yaml.safe_load)):
        path = model_folder.parent / name
        try:
            found.append(dict(parse(path.read_text())) if model_folder.name == 'model' and path.is_file() else {})
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise InputError(
                f"'{path}' is damaged ({one_line(error)}): restore it, or move the model away.") from error
    return found[0], found[1]


def find_report(
        folder: Optional[str],
        model_folder: Path,
        config: Dict[str, Any],
        result: Dict[str, Any],
) -> List[Path]:
    """The files of a report that go beside a card.

    Args:
        folder: The report's, or None for `report` in the run folder, if there is one.
        model_folder: The model's.
        config: Its `config.json`.
        result: Its metrics, empty where they are not known.

    Raises:
        InputError: If there is no report, or it is of another model.
    """
    own = model_folder.resolve().parent / 'report'
    if folder is None and (model_folder.resolve().name != 'model' or not (own / TABLE).is_file()):
        return []
    report = own if folder is None else Path(folder)
    paths = [report / name for name in (*FIGURES, TABLE)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"'{missing[0]}' does not exist: give --report the folder that shike report wrote.")
    problem = None
    try:
        with paths[-1].open(newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        counts = {row['class']: int(row['training images']) for row in rows}
        right = sum(float(row['ensemble']) * int(row['test images']) for row in rows if row['ensemble'])
        top1 = right / max(sum(int(row['test images']) for row in rows), 1)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"'{paths[-1]}' is damaged ({one_line(error)}): make the report anew.") from error
    names = config.get('label_names')
    if names and config.get('class_counts') and counts != dict(zip(names, config['class_counts'])):
        problem = 'classes or their training images are not those of the model'
    elif abs(result.get('top1', top1) - top1) > 0.5:  # devices round differently, and a second stage is far away
        problem = f"top-1 is {top1:.2f} and that of the run {result['top1']:.2f}"
    if problem:
        raise InputError(f"'{report}' is of another model, as its {problem}: make it anew, or move it away.")
    return paths


def _check_repo_id(repo_id: str) -> None:
    problem = None if repo_id.count('/') == 1 else 'it has not the form USER/NAME'
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        problem = problem or one_line(error)
    if problem:
        raise InputError(f"--repo-id '{repo_id}' cannot be a name on the Hub ({problem}): choose another.")


def _explain(error: BaseException, repo_id: str, endpoint: str) -> Exception:
    """One sentence for whatever huggingface_hub raised."""
    if isinstance(error, OfflineModeIsEnabled):
        return InputError('HF_HUB_OFFLINE is set, which forbids every request to the Hub: unset it to publish.')
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # those of an upload come wrapped
    status, reason = 0, one_line(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = f'{status}: {one_line(error.server_message or error.response.reason_phrase)}'
    known = {
        401: f"The Hub refused the token ({reason}): give one that may write by 'hf auth login --force' or HF_TOKEN.",
        403: f"The Hub does not let this token write to '{repo_id}' ({reason}): choose a --repo-id of your own, "
             'a token that may write there, or free some storage.',
        404: f"'{repo_id}' is taken, or not to be seen with this token ({reason}): choose another --repo-id.",
    }
    if status in known:
        return InputError(known[status])
    return PublishError(
        f'Publishing to {endpoint} failed ({reason}): look at {endpoint}/{repo_id} for what is there, and repeat the '
        'command later.')


def _prepare_repo(api: HfApi, args: PublishConfig, card: ModelCard) -> Optional[str]:
    """Have the Hub check the card and see to the repository; gives the newest commit in it."""
    try:
        card.validate()  # or the Hub would first do so when the repository is made
    except ValueError as error:
        raise InputError(
            f'The Hub does not take the metadata of the card ({one_line(error)}): see that --license is one of its '
            'identifiers, such as mit.') from error
    api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)  # None leaves an organisation's default
    info = api.model_info(args.repo_id)
    # .gitattributes is what an attempt leaves that failed before its commit.
    if not args.update and {file.rfilename for file in info.siblings or []} - {'.gitattributes'}:
        raise InputError(
            f"'{args.repo_id}' already holds files: add --update to replace them, or choose another --repo-id.")
    if args.private and not info.private:
        raise InputError(
            f"'{args.repo_id}' exists and is public: make it private in its settings there, or leave out --private.")
    return info.sha


def publish(args: PublishConfig) -> str:
    """Publish a model with its card, in one commit.

    Args:
        args: What `parse_publish_args` gives.

    Returns:
        The model's URL.

    Raises:
        InputError: If anything given cannot work: no loadable model, a bad name, no token or one without permission,
            a name that is taken.
        PublishError: If the Hub or the connection failed.
    """
    _check_repo_id(args.repo_id)
    folder = find_model(args.model)
    metrics, run_args = read_run(folder)
    model = load_trained_model(f'local-dir:{folder}').model
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    config.get('model_args', {}).pop('pretrained_backbone', None)  # of no use there, and perhaps a path of ours
    report = find_report(args.report, folder, config, list(metrics.values())[-1] if metrics else {})
    card = model_card(args.repo_id, model, config, metrics, run_args, args.license, with_report=bool(report))
    if not re.fullmatch('[!-~]+', get_token() or ''):  # other characters would make an error that quotes it
        raise InputError(
            "There is no token for the Hub, or not one that can be: log in with 'hf auth login --force', or set "
            'HF_TOKEN.')

    hub_logging.set_verbosity_error()  # it tells of every new attempt, and a failure comes to one sentence
    disable_progress_bars()
    api = HfApi()
    url = f'{api.endpoint}/{args.repo_id}'
    try:
        parent = _prepare_repo(api, args, card)
        print(f'Uploading {(folder / WEIGHTS_FILE).stat().st_size / 1e6:.1f} MB to {url}', flush=True)
        additions = [
            CommitOperationAdd(WEIGHTS_FILE, folder / WEIGHTS_FILE),
            CommitOperationAdd(CONFIG_FILE, json.dumps(config, indent=2).encode()),
            CommitOperationAdd(CARD, str(card).encode()),
            *(CommitOperationAdd(path.name, path) for path in report),
        ]
        api.create_commit(
            args.repo_id, additions, commit_message='Publish model with shike-timm', parent_commit=parent)
    except InputError:
        raise
    except Exception as error:  # whatever the Hub's answer, or its silence, makes huggingface_hub raise
        raise _explain(error, args.repo_id, api.endpoint) from error
    print(f"{url} - load it with: import shike_timm, timm; timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")
    return url
