"""Publishing to the Hugging Face Hub: checked before the first request, committed whole or not at all."""
import argparse
import importlib
import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from ..errors import InputError, one_line
from ..loading import load_trained_model
from ..model_card import model_card
from ..options import Group, Option, complete, read_command_line
from .cli import run_script

__all__ = ['OPTIONS', 'PublishError', 'find_model', 'main', 'parse_publish_args', 'publish', 'read_run']

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'
TIMEOUT = 60.  # seconds the Hub may take for one answer, where HF_HUB_DOWNLOAD_TIMEOUT does not say


class PublishError(OSError):
    """The Hub, or the way to it, failed. The message is one sentence that says what is published and what to do."""


class _NoAnswer(Exception):
    pass


def _patience() -> float:
    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if 'HF_HUB_DOWNLOAD_TIMEOUT' in os.environ else TIMEOUT


def _create_client() -> Any:
    """The HTTP client of huggingface_hub, which by itself waits for ever, with an end to its patience."""
    client = default_client_factory()
    http = importlib.import_module(type(client).__module__.split('.')[0])  # httpx or httpx2, as the version has it
    seconds = _patience()
    client.timeout = http.Timeout(seconds, connect=min(seconds, 10.))
    send = client.send

    def send_in_time(*args: Any, **kwargs: Any) -> Any:
        try:
            response = send(*args, **kwargs)
        except http.TimeoutException as error:
            # As an exception that huggingface_hub does not try again on: six times as long would be minutes.
            raise _NoAnswer(f'{seconds:g} seconds') from error
        for name in ('retry-after', 'ratelimit'):  # it would wait as long as they say, its own pauses make 23 seconds
            response.headers.pop(name, None)
        return response

    client.send = send_in_time
    return client


@contextmanager
def _patient_client() -> Iterator[None]:
    # Each request and each new attempt is a line of theirs; a failure comes to one sentence at the end.
    loggers = [logging.getLogger(name) for name in ('huggingface_hub', 'httpx', 'httpx2')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    set_client_factory(_create_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _cause(error: Optional[BaseException], kind: Union[type, Tuple[type, ...]]) -> Any:
    """The first exception of a kind among an error and its causes, as errors of an upload come wrapped."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _explain(error: Exception, doing: str, repo_id: str, endpoint: str, outcome: str) -> Exception:
    """One sentence for whatever huggingface_hub raised."""
    known = _cause(error, (HfHubHTTPError, OfflineModeIsEnabled, _NoAnswer))
    if isinstance(known, OfflineModeIsEnabled):
        return InputError('HF_HUB_OFFLINE is set, which forbids every request to the Hub: unset it to publish.')
    if isinstance(known, _NoAnswer):
        return PublishError(
            f'The Hub at {endpoint} gave no answer to {doing} in {known}: {outcome}; repeat the command later, or '
            'allow more seconds with HF_HUB_DOWNLOAD_TIMEOUT.')
    # The HTTP library's own errors: huggingface_hub's derives from their base.
    lost = _cause(error, HfHubHTTPError.__mro__[1]) if known is None else None
    if lost is not None:
        return PublishError(
            f'The connection to {endpoint} failed at {doing} ({one_line(lost)}): {outcome}; '
            'see that the network and HF_ENDPOINT are right, and repeat the command.')

    status, message = 0, one_line(error)
    if known is not None:
        status, message = known.response.status_code, known.server_message or known.response.reason_phrase
        message = f'{status}: {one_line(message)}'
    about_room = status in (400, 403, 409) and re.search(
        r'\b(storage|quota|(disk|of|no|free) space)\b', message, re.IGNORECASE)
    if status in (402, 413, 507) or about_room:
        return PublishError(
            f'The Hub has no room for the model ({message}): {outcome}; free some storage there or choose another '
            '--repo-id, and repeat the command.')
    if status == 401:
        return InputError(
            f'The Hub refused the token ({message}): make one that may write at {endpoint}/settings/tokens, and give '
            "it with 'hf auth login --force' or as HF_TOKEN.")
    if status == 403:
        return InputError(
            f"The token may not write to '{repo_id}' ({message}): choose a --repo-id of your own, or a token with "
            'write permission there.')
    if status == 412:
        return PublishError(f"'{repo_id}' was changed by another at the same time ({message}): repeat the command.")
    if status == 429:
        return PublishError(f'The Hub had too many requests ({message}): {outcome}; repeat the command in minutes.')
    if status >= 500:
        return PublishError(f'The Hub failed at {doing} ({message}): {outcome}; repeat the command later.')
    if status:
        return PublishError(f'The Hub refused {doing} ({message}): {outcome}.')
    return PublishError(
        f'The Hub at {endpoint} gave an answer to {doing} that makes no sense ({type(error).__name__}: {message}): '
        f'{outcome}; see that HF_ENDPOINT is right.')


def find_model(path: str) -> Path:
    """The model folder of a run folder, or the model folder itself.

    Raises:
        InputError: If there is no model.
    """
    for folder in (Path(path), Path(path, 'model')):
        if (folder / CONFIG).is_file():
            if not (folder / WEIGHTS).is_file():
                raise InputError(f"'{folder}' lacks {WEIGHTS}: give a model folder that train.py wrote.")
            return folder
    if not Path(path).is_dir():
        raise InputError(f"'{path}' is not a folder: give the run folder of train.py, or the model folder in it.")
    raise InputError(f"'{path}' holds no model: give a run folder whose training is finished, or a model folder.")


def read_run(model_folder: Path) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Metrics and arguments of the run a model folder lies in; empty where there is none.

    Raises:
        InputError: If their files are damaged.
    """
    model_folder = model_folder.resolve()
    found: Dict[str, Dict[str, Any]] = {}
    for name, parse in (('metrics.json', json.loads), ('args.yaml', yaml.safe_load)):
        path = model_folder.parent / name
        found[name] = {}
        if model_folder.name == 'model' and path.is_file():
            try:
                found[name] = dict(parse(path.read_text()))
            except (ValueError, TypeError, yaml.YAMLError) as error:
                raise InputError(
                    f"'{path}' is damaged ({one_line(error)}): restore it, or move the model away.") from error
    return found['metrics.json'], found['args.yaml']


def _check_repo_id(repo_id: str) -> None:
    problem = None if repo_id.count('/') == 1 else 'it has not the form USER/NAME'
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        problem = problem or one_line(error)
    if problem:
        raise InputError(f"--repo-id '{repo_id}' cannot be a name on the Hub ({problem}): choose another.")


def _check_card(card: ModelCard) -> None:
    """Have the Hub check the card, which it would otherwise do after the upload."""
    try:
        card.validate()
    except ValueError as error:
        raise InputError(
            f'The Hub does not take the metadata of the card ({one_line(error)}): see that --license is one of its '
            'identifiers, such as mit.') from error


def _create_repo(api: HfApi, args: argparse.Namespace) -> Optional[str]:
    """Create the repository, or see whether the one that exists may be written to.

    Returns:
        The newest commit of a repository that existed.
    """
    try:
        api.create_repo(args.repo_id, private=args.private or None)  # None leaves an organisation's default
        return None
    except HfHubHTTPError as error:
        # A token for one repository alone may not create any.
        if error.response.status_code != 409 and not (args.update and error.response.status_code == 403):
            raise
    taken = InputError(
        f"'{args.repo_id}' already holds files: add --update to replace them, or choose another --repo-id.")
    try:
        info = api.model_info(args.repo_id, timeout=_patience())
    except RepositoryNotFoundError as error:
        raise taken from error
    # .gitattributes is what an attempt leaves that failed before its commit.
    if not args.update and {file.rfilename for file in info.siblings or []} - {'.gitattributes'}:
        raise taken
    if args.private and info.private is False:
        raise InputError(
            f"'{args.repo_id}' exists and is public: make it private in its settings there, or leave out --private.")
    return info.sha


def _is_committed(api: HfApi, repo_id: str, parent: Optional[str], weights: CommitOperationAdd) -> Optional[bool]:
    """Whether a commit arrived of which no answer came back; None where the Hub does not say."""
    try:
        info = api.model_info(repo_id, files_metadata=True, timeout=10.)
    except Exception:  # the Hub has just failed, and may fail in any way again
        return None
    sha256 = weights.upload_info.sha256.hex()
    return info.sha != parent and any(
        file.rfilename == WEIGHTS and file.lfs is not None and file.lfs.sha256 == sha256
        for file in info.siblings or [])


def publish(args: argparse.Namespace) -> str:
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
    config = json.loads((folder / CONFIG).read_bytes())
    config.get('model_args', {}).pop('pretrained_backbone', None)  # of no use there, and perhaps a path of ours
    try:
        card = model_card(args.repo_id, model, config, metrics, run_args, args.license)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The files beside '{folder}' are not those of train.py ({type(error).__name__}: {one_line(error)}): "
            'restore them, or move the model away.') from error
    token = get_token()
    if not token:
        raise InputError("There is no token for the Hub: log in with 'hf auth login', or set HF_TOKEN.")
    if not re.fullmatch('[!-~]+', token):
        raise InputError(
            'The token for the Hub holds blanks or other characters that no token has: copy it anew, and give it with '
            "'hf auth login --force' or as HF_TOKEN.")

    api = HfApi(endpoint=constants.ENDPOINT)
    url = f'{api.endpoint}/{args.repo_id}'
    doing, outcome = 'the check of the card', f"nothing was published to '{args.repo_id}'"
    # From an open file, since huggingface_hub sends those by plain HTTP, whose errors say what was wrong.
    with _patient_client(), (folder / WEIGHTS).open('rb') as file:
        weights = CommitOperationAdd(WEIGHTS, file)
        additions = [weights]
        for path, text in ((CONFIG, json.dumps(config, indent=2)), (CARD, str(card))):
            additions.append(CommitOperationAdd(path, text.encode()))
        try:
            _check_card(card)
            doing = 'the creation of the repository'
            parent = _create_repo(api, args)
            print(f'Uploading {weights.upload_info.size / 1e6:.1f} MB to {url}', flush=True)
            doing = 'the upload'
            api.preupload_lfs_files(args.repo_id, additions)
            doing = 'the commit'
            try:
                api.create_commit(
                    args.repo_id, additions, commit_message='Publish model with shike-timm', parent_commit=parent)
            except Exception as error:
                answer = _cause(error, HfHubHTTPError)
                if answer is not None and answer.response.status_code < 500:
                    raise
                committed = _is_committed(api, args.repo_id, parent, weights)
                if committed is None or _cause(error, _NoAnswer) is not None:
                    outcome = f'whether the model is published is not known, look at {url}'
                if not committed:
                    raise
        except InputError:
            raise
        except Exception as error:  # whatever the Hub's answer, or its silence, makes huggingface_hub raise
            raise _explain(error, doing, args.repo_id, api.endpoint, outcome) from error
    print(f"{url} - load it with: import shike_timm, timm; timm.create_model('hf-hub:{args.repo_id}', pretrained=True)")
    return url


OPTIONS = (
    Group(
        'Publishing',
        Option(
            'model', str, None, 'run folder of train.py, or a model folder such as RUN/model', 'RUN', positional=True),
        Option('repo_id', str, None, 'name on the Hub', 'USER/NAME', required=True),
        Option('private', bool, False, 'make the repository private'),
        Option('update', bool, False, 'replace what is already published there'),
        Option(
            'license', str, None, "license on the card, such as mit; by default that of the backbone's weights", 'ID'),
    ),
)


def parse_publish_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Arguments of publish.py.

    Raises:
        InputError: If an argument is wrong.
    """
    return complete(
        OPTIONS, read_command_line('Publish a trained model and its card to the Hugging Face Hub.', OPTIONS, argv))


def main() -> int:
    return run_script(lambda: publish(parse_publish_args()))
