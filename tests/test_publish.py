"""Publishing to the Hub: the card, the round trip, and every way in which it can fail."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import yaml
from conftest import ROOT, read_yaml
from huggingface_hub import HfApi, ModelCard, constants, get_session
from loopback_hub import LoopbackHub
from PIL import Image
from timm.models._hub import save_for_hf

from shike_timm.commands import publish as publishing
from shike_timm.commands.train import parse_train_args
from shike_timm.model_card import METRIC_NAMES, model_card
from shike_timm.options import TRAIN
from shike_timm.runs import train

# huggingface_hub passes files that way.
pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

NAME = 'tester/digits'
TAKEN = 'add --update to replace them, or choose another --repo-id.'


@pytest.fixture(scope='module')
def server():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """A Hub without repositories, which this process is logged in to and whose client does not pause."""
    server.reset()
    monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_TELEMETRY', True)
    monkeypatch.setenv('HF_TOKEN', server.token)
    monkeypatch.delenv('HF_HUB_DOWNLOAD_TIMEOUT', raising=False)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    return server


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / 'run')


def environment(hub, home):
    return dict(
        os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_ENDPOINT=hub.endpoint, HF_TOKEN=hub.token,
        HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY='1')


def start(hub, home, script, *argv):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, argv)], env=environment(hub, home), capture_output=True, text=True)


def read_files(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    return json.loads((run / 'model' / 'config.json').read_text()), metrics, read_yaml(run / 'args.yaml')


def tiny_card(run, metrics=None, args=None):
    model = timm.create_model(f'local-dir:{run}/model', pretrained=True)
    return model_card(NAME, model, read_files(run)[0], metrics, args)


def block(text, language):
    return text.split(f'```{language}\n')[1].split('```')[0]


def test_card_says_what_the_files_say(tiny_run, tmp_path):
    config, metrics, args = read_files(tiny_run)
    metrics['stage_two'].update(top1=12.34, few=None)
    metrics['stage_two']['experts'][1]['medium'] = 56.7
    args.update(data_dir='/home/me/data', seed=1234, pretrained_backbone='/home/me/weights.pth')
    args.update(kd_model_name='local-dir:/home/me/RUN/model/')
    text = str(tiny_card(tiny_run, metrics, args))
    card = ModelCard(text)

    assert card.data.library_name == 'timm' and card.data.license is None
    assert card.data.pipeline_tag == 'image-classification' and {'shike', 'long-tailed'} <= set(card.data.tags)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        label: metrics['stage_two'][key] for key, label in METRIC_NAMES.items() if key != 'few'}
    assert {(r.dataset_type, r.dataset_split, r.metric_type) for r in card.data.eval_results} == {
        ('digits_lt', 'test', 'accuracy')}
    assert str(card) == text

    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    for stage, name in (('stage_one', 'one'), ('stage_two', 'two')):
        result = metrics[stage]
        outputs = [('ensemble', result), *((f'expert {m}', result['experts'][m]) for m in range(3))]
        for output, values in outputs:
            cells = ['-' if values[key] is None else f'{values[key]:.2f}' for key in METRIC_NAMES]
            assert [name, output, *cells] in rows
    counts = config['class_counts']
    assert ['classes', '10'] in rows and ['training images', str(sum(counts))] in rows
    assert ['images of the largest class', '124'] in rows and ['images of the smallest class', '6'] in rows
    shots = [sum(c > 100 for c in counts), sum(20 <= c <= 100 for c in counts), sum(c < 20 for c in counts)]
    assert [int(row[1]) for row in rows if '-shot classes' in row[0]] == shots
    assert 'imbalance factor 20 (exp)' in text and 'seed 1234' in text

    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(block(text, 'yaml'))
    told = yaml.safe_load(recipe.read_text())
    assert told.pop('pretrained_backbone') == 'weights.pth'
    assert told.pop('kd_model_name') == 'local-dir:RUN/model' and {'distill_loss_weight', 'kd_temperature'} <= set(told)
    assert {'epochs', 'lr', 'batch_size', 'train_crop_mode', 'alpha', 'beta', 'seed'} <= set(told)
    assert all(args[key] == value for key, value in told.items())
    for secret in ('/home/me', str(tiny_run.parent), 'data_dir', 'output:'):
        assert secret not in text


@pytest.mark.parametrize('options', [
    ['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100.yaml')],
    ['--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--clip-grad', '1', '--clip-mode', 'agc'],
    ['--dataset', 'torch/cifar100', '--train-split', 'train', '--sched', 'step', '--decay-rate', '0.2', '--scale',
     '0.5', '1', '--mean', '0.5', '--drop-path', '0', '--mixup', '0.2', '--alpha', '0', '--mixup-mode', 'elem'],
    ['--hparams', str(ROOT / 'hparams' / 'cifar100_lt_if100_distilled.yaml')],
    ['--kd-model-name', 'hf-hub:me/net@v1', '--distill-loss-weight', '2'],
])
def test_the_recipe_on_the_card_is_that_of_the_run(tiny_run, tmp_path, options):
    args = vars(parse_train_args(options))
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(block(str(tiny_card(tiny_run, read_files(tiny_run)[1], args)), 'yaml'))
    again = vars(parse_train_args(['--hparams', str(recipe)]))
    own = {option.name for group in TRAIN for option in group.options if option.card == 'never'}
    assert {key for key, value in args.items() if again[key] != value} <= own


def test_license(hub, run_script, run_copy):
    path = run_copy / 'model' / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['license'] = 'cc-by-nc-4.0'  # of weights it started from
    path.write_text(json.dumps(config))
    for options, expected in (([], 'cc-by-nc-4.0'), (['--license', 'mit', '--update'], 'mit')):
        assert run_script('publish.py', run_copy, '--repo-id', NAME, *options)[0] == 0
        assert ModelCard(hub.files(NAME)['README.md'].decode()).data.license == expected
    status, _, error = run_script('publish.py', run_copy, '--repo-id', 'tester/other', '--license', 'Free')
    assert status == 2 and 'see that --license is one of its identifiers' in error and len(error.splitlines()) == 1
    assert 'tester/other' not in hub.repos


def test_the_code_on_the_card_runs(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((9, 9), 128, dtype=np.uint8)).save('image.png')
    names = {}
    code = block(str(tiny_card(tiny_run)), 'python')
    exec(code.replace(f'hf-hub:{NAME}', f'local-dir:{tiny_run}/model'), names)
    assert names['logits'].shape == (1, 10) and names['experts'].shape == (1, 3, 10)
    assert names['label'] in [str(digit) for digit in range(10)]


def test_cards_of_other_runs(tiny_run):
    _, metrics, args = read_files(tiny_run)
    bare = tiny_card(tiny_run)
    assert 'No metrics are at hand' in bare.text and 'Recipe' not in bare.text
    assert bare.data.eval_results is None and 'model-index' not in str(bare)
    two = block(str(tiny_card(tiny_run, metrics, args)), 'yaml')
    del metrics['stage_two']
    assert 'crt_' in two and 'crt_' not in block(str(tiny_card(tiny_run, metrics, args)), 'yaml')
    card = ModelCard(str(tiny_card(tiny_run, metrics, dict(args, dataset=''))))
    assert card.data.eval_results[0].metric_value == metrics['stage_one']['top1']
    assert card.data.eval_results[0].dataset_type == 'imagefolder'
    assert 'a folder of images' in card.text and 'imb_factor' not in card.text and 'imbalance' not in card.text
    assert '| data set | torch/cifar100 |' in tiny_card(tiny_run, metrics, dict(args, dataset='torch/cifar100')).text


def check_round_trip(hub, run, tmp_path):
    """Publish a run from a process of its own, and evaluate what is on the Hub from another."""
    expected = json.loads((run / 'metrics.json').read_text())['stage_two']
    del expected['seconds']
    content = {name: (run / 'model' / name).read_bytes() for name in ('model.safetensors', 'config.json')}
    result = start(hub, tmp_path / 'home', 'publish.py', run, '--repo-id', NAME)
    assert result.returncode == 0 and not result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f'{hub.endpoint}/{NAME} ') and f"timm.create_model('hf-hub:{NAME}', pretrained=True)" in last
    files = hub.files(NAME)
    assert ModelCard(files.pop('README.md').decode()).data.eval_results[0].metric_value == expected['top1']
    assert files == content and len(hub.repos[NAME].commits) == 2 and not hub.repos[NAME].private

    shutil.rmtree(run)
    result = start(
        hub, tmp_path / 'fresh', 'eval.py', '--model', f'hf-hub:{NAME}', '--dataset', 'digits_lt', '--workers', '0',
        '--device', 'cpu', '--results-file', tmp_path / 'results.json')
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / 'results.json').read_text()) == expected


def test_round_trip(hub, run_copy, tmp_path):
    check_round_trip(hub, run_copy, tmp_path)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    assert api.whoami()['name'] == 'tester'
    weights = {file.path: file for file in api.list_repo_tree(NAME)}['model.safetensors']
    assert weights.lfs.sha256 == hashlib.sha256(hub.files(NAME)['model.safetensors']).hexdigest()


@pytest.mark.slow
def test_round_trip_of_the_quickstart(hub, tmp_path):
    train(parse_train_args([
        '--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--output', str(tmp_path), '--experiment', 'run']))
    check_round_trip(hub, tmp_path / 'run', tmp_path)


def test_model_folders(hub, run_script, tiny_run, tmp_path):
    status, _, _ = run_script('publish.py', tiny_run / 'model', '--repo-id', NAME)
    assert status == 0 and ModelCard(hub.files(NAME)['README.md'].decode()).data.eval_results
    shutil.copytree(tiny_run / 'model', tmp_path / 'model')
    config = json.loads((tmp_path / 'model' / 'config.json').read_text())
    config['model_args']['pretrained_backbone'] = '/home/me/weights.pth'  # of a model made in Python
    (tmp_path / 'model' / 'config.json').write_text(json.dumps(config))
    status, out, _ = run_script('publish.py', tmp_path / 'model', '--repo-id', 'tester/bare', '--private')
    assert status == 0 and hub.repos['tester/bare'].private
    assert 'No metrics are at hand' in hub.files('tester/bare')['README.md'].decode()
    assert not any(b'/home/me' in content for content in hub.files('tester/bare').values())


def test_update(hub, run_script, run_copy):
    publish = ['publish.py', run_copy, '--repo-id', NAME]
    assert run_script(*publish)[0] == 0
    before = hub.files(NAME)
    status, out, error = run_script(*publish)
    assert status == 2 and not out
    assert error == f"publish.py: error: '{NAME}' already holds files: {TAKEN}\n"
    assert hub.files(NAME) == before and len(hub.repos[NAME].commits) == 2

    metrics = json.loads((run_copy / 'metrics.json').read_text())
    metrics['stage_two']['top1'] = 43.21
    (run_copy / 'metrics.json').write_text(json.dumps(metrics))
    hub.requests.clear()
    assert run_script(*publish, '--update')[0] == 0
    assert '43.21' in hub.files(NAME)['README.md'].decode() and len(hub.repos[NAME].commits) == 3
    assert 'lfs_upload' not in hub.requests  # the weights are there already
    hub.fail('create', status=403, message='This token is for one repository alone.')
    assert run_script(*publish, '--update')[0] == 0
    assert len(hub.repos[NAME].commits) == 3  # nothing has changed
    hub.failures.clear()

    assert run_script(*publish[:-1], 'tester/new', '--update')[0] == 0  # nothing to replace


def test_a_card_of_ones_own_is_not_replaced(hub, run_script, tiny_run):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(NAME)
    mine = b'---\nlicense: mit\n---\n# mine'
    api.upload_file(path_or_fileobj=mine, path_in_repo='README.md', repo_id=NAME)
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 2 and TAKEN in error and hub.files(NAME) == {'README.md': mine}


def test_a_name_that_is_taken_unseen(hub, run_script, tiny_run):
    hub.fail('create', status=409, message='Name taken')
    hub.fail('info', status=404, message='Repository not found', headers={'X-Error-Code': 'RepoNotFound'})
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 2 and TAKEN in error


def test_visibility(hub, run_script, tiny_run):
    publish = ['publish.py', tiny_run, '--repo-id', NAME]
    hub.fail('lfs_batch', status=403, message='Storage limit reached.', times=1)
    assert run_script(*publish, '--private')[0] == 1
    assert hub.repos[NAME].private
    assert run_script(*publish)[0] == 0 and hub.repos[NAME].private
    hub.repos[NAME].private = False
    status, _, error = run_script(*publish, '--private', '--update')
    assert status == 2 and f"'{NAME}' exists and is public" in error


ROOM = 'The Hub has no room for the model'
AGAIN = f"nothing was published to '{NAME}'; repeat the command later"
LATER = {'Retry-After': '3600'}
FAILURES = [
    ('create', dict(status=401, message='Invalid username or password.'), 2,
     'The Hub refused the token (401: Invalid username or password): make one that may write'),
    ('create', dict(status=403, message='No rights under the namespace "tester"'), 2,
     f"The token may not write to '{NAME}' (403: No rights under the namespace"),
    ('create', dict(status=400, message='Bad name.'), 1,
     'The Hub refused the creation of the repository (400: Bad name): nothing was published'),
    ('create', dict(status=429, message='Slow down', headers=LATER), 1, 'had too many requests (429: Slow down)'),
    ('create', dict(status=429, message='You exceeded your quota'), 1, 'had too many requests (429: You exceeded'),
    ('create', dict(status=401, message='No access to storage'), 2, 'The Hub refused the token (401: No access'),
    ('create', dict(status=403, message='No write access to this Space'), 2, f"The token may not write to '{NAME}'"),
    ('create', dict(status=200), 1, 'gave an answer to the creation of the repository that makes no sense (KeyError'),
    ('create', dict(delay=30), 1, f'gave no answer to the creation of the repository in 1.5 seconds: {AGAIN}'),
    ('preupload', dict(status=503, message='Busy', headers=LATER), 1, f'failed at the upload (503: Busy): {AGAIN}'),
    ('lfs_batch', dict(status=403, message='Private repository storage limit reached.'), 1, ROOM),
    ('lfs_upload', dict(status=507), 1, f'{ROOM} (507: Insufficient Storage)'),
    ('lfs_upload', dict(status=500, message='Broken'), 1, f'The Hub failed at the upload (500: Broken): {AGAIN}'),
    ('lfs_upload', dict(drop='before'), 1, 'failed at the upload ('),
    ('lfs_upload', dict(delay=30), 1, f'gave no answer to the upload in 1.5 seconds: {AGAIN}'),
    ('lfs_verify', dict(status=502), 1, 'The Hub failed at the upload (502: Bad Gateway)'),
    ('validate', dict(status=500), 1, f'The Hub failed at the check of the card (500: Internal Server Error): {AGAIN}'),
    ('commit', dict(status=413, message='Payload too large'), 1, ROOM),
    ('commit', dict(status=403, message='Read only'), 2, f"The token may not write to '{NAME}' (403: Read only)"),
    ('commit', dict(status=500, message='Broken'), 1, f'The Hub failed at the commit (500: Broken): {AGAIN}'),
    ('commit', dict(drop='before'), 1, 'failed at the commit ('),
    ('commit', dict(delay=30, status=500), 1, 'whether the model is published is not known, look at http://'),
]


@pytest.mark.parametrize(
    'endpoint, failure, expected, sentence', FAILURES,
    ids=['-'.join([case[0], *map(str, min(case[1].items()))]) for case in FAILURES])
def test_failures_of_the_hub(hub, run_script, tiny_run, monkeypatch, endpoint, failure, expected, sentence):
    if 'delay' in failure:
        monkeypatch.setattr(publishing, 'TIMEOUT', 1.5)
    hub.fail(endpoint, **failure)
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == expected, error
    assert sentence in error and error.startswith('publish.py: error: ') and len(error.splitlines()) == 1
    assert not hub.files(NAME)
    hub.failures.clear()
    assert run_script('publish.py', tiny_run, '--repo-id', NAME)[0] == 0
    assert set(hub.files(NAME)) == {'model.safetensors', 'config.json', 'README.md'}


def test_a_failure_seen_from_outside(hub, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_DOWNLOAD_TIMEOUT', '3')
    hub.fail('lfs_upload', delay=60)
    result = start(hub, tmp_path, 'publish.py', tiny_run, '--repo-id', NAME)
    assert result.returncode == 1
    assert result.stderr == (
        f'publish.py: error: The Hub at {hub.endpoint} gave no answer to the upload in 3 seconds: {AGAIN}, or allow '
        'more seconds with HF_HUB_DOWNLOAD_TIMEOUT.\n')
    assert not hub.files(NAME)


@pytest.mark.parametrize('endpoint, failure', [
    ('lfs_upload', dict(status=500, times=2)),
    ('lfs_upload', dict(drop='before', times=2)),
    ('preupload', dict(status=429, headers=LATER, times=1)),
    ('commit', dict(drop='after')),  # only the answer is lost
])
def test_failures_that_pass(hub, run_script, tiny_run, endpoint, failure):
    hub.fail(endpoint, **failure)
    assert run_script('publish.py', tiny_run, '--repo-id', NAME)[0] == 0
    assert len(hub.files(NAME)) == 3 and len(hub.repos[NAME].commits) == 2


def test_a_commit_of_unknown_fate(hub, run_script, tiny_run):
    hub.fail('commit', drop='after')
    hub.fail('info', status=500)
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 1 and f'whether the model is published is not known, look at {hub.endpoint}/{NAME};' in error


def test_a_slow_hub(hub, run_script, tiny_run, monkeypatch):
    monkeypatch.setattr(publishing, 'TIMEOUT', 2.)
    for endpoint in ('create', 'preupload', 'lfs_batch', 'lfs_upload', 'lfs_verify', 'validate', 'commit'):
        hub.fail(endpoint, delay=0.3)
    assert run_script('publish.py', tiny_run, '--repo-id', NAME)[0] == 0
    assert len(hub.files(NAME)) == 3


def test_nobody_there(hub, run_script, tiny_run, unused_port, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{unused_port}')
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 1 and f'The connection to http://127.0.0.1:{unused_port} failed' in error
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 2 and 'HF_HUB_OFFLINE is set' in error


def test_others_names_and_tokens(hub, run_script, tiny_run, monkeypatch):
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', 'other/digits')
    assert status == 2 and "The token may not write to 'other/digits' (403: You don't have the rights" in error
    for token in ('hf_sec\x0bret', 'hf_s\u00e9cret'):
        monkeypatch.setenv('HF_TOKEN', token)
        status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
        assert status == 2 and 'characters that no token has' in error and 'cret' not in error
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    status, _, error = run_script('publish.py', tiny_run, '--repo-id', NAME)
    assert status == 2 and 'The Hub refused the token (401: ' in error and 'settings/tokens' in error
    assert not hub.repos


def test_another_commit_in_between(hub, run_script, run_copy, monkeypatch):
    assert run_script('publish.py', run_copy, '--repo-id', NAME)[0] == 0
    (run_copy / 'metrics.json').unlink()
    validate = hub.validate

    def intervene(request):
        hub.repos[NAME].add_commit(dict(hub.files(NAME), LICENSE=b'MIT'), 'by another')
        return validate(request)

    monkeypatch.setattr(hub, 'validate', intervene)
    before = hub.files(NAME)['README.md']
    status, _, error = run_script('publish.py', run_copy, '--repo-id', NAME, '--update')
    assert status == 1 and f"'{NAME}' was changed by another at the same time (412: " in error
    assert hub.files(NAME)['README.md'] == before and 'LICENSE' in hub.files(NAME)


@pytest.fixture
def refused(hub, run_script):
    """Check that publish.py refuses its arguments in one sentence, before the first request."""

    def check(value, *argv):
        status, out, error = run_script('publish.py', *argv)
        assert status == 2, error
        assert str(value) in error and len(error.splitlines()) == 1 and not out
        assert not hub.requests

    return check


@pytest.mark.parametrize('repo_id', ['digits', 'a/b/c', 'tester/my digits', 'tester/..', 'tester/x.git', '/digits', ''])
def test_bad_names(refused, tiny_run, repo_id):
    refused(f"--repo-id '{repo_id}' cannot be a name on the Hub", tiny_run, '--repo-id', repo_id)


def test_bad_folders(refused, run_copy, tmp_path):
    name = ['--repo-id', NAME]
    refused('required: --repo-id', run_copy)
    refused(f"'{tmp_path}/gone' is not a folder", tmp_path / 'gone', *name)
    refused(f"'{run_copy}/args.yaml' is not a folder", run_copy / 'args.yaml', *name)
    refused(f"'{run_copy}/stage_one' holds no model", run_copy / 'stage_one', *name)

    metrics = (run_copy / 'metrics.json').read_text()
    for text, value in ((metrics[:50], "metrics.json' is damaged"), ('{"top1": 1}', 'are not those of train.py')):
        (run_copy / 'metrics.json').write_text(text)
        refused(value, run_copy, *name)
    (run_copy / 'metrics.json').write_text(metrics)

    weights = run_copy / 'model' / 'model.safetensors'
    for content in (weights.read_bytes()[:100_000], b'', b'no weights'):
        weights.write_bytes(content)
        refused(f"model 'local-dir:{run_copy}/model' cannot be loaded", run_copy, *name)
    weights.unlink()
    refused(f"'{run_copy}/model' lacks model.safetensors", run_copy, *name)
    save_for_hf(timm.create_model('test_resnet'), run_copy / 'model', safe_serialization=True)
    refused('expected a SHIKE model', run_copy, *name)


def test_no_token(refused, tiny_run, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    refused('There is no token for the Hub', tiny_run, '--repo-id', NAME)


def test_the_client_is_left_as_it_was(hub, run_script, tiny_run):
    before = get_session().timeout
    assert run_script('publish.py', tiny_run, '--repo-id', NAME)[0] == 0
    assert get_session().timeout == before
