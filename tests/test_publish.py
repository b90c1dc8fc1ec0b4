"""Publishing to the Hub: the card, the round trip, and one sentence for everything that can fail."""
import json
import re
import shutil
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, read_yaml
from huggingface_hub import ModelCard, constants
from loopback_hub import TOKEN, LoopbackHub
from PIL import Image

from shike_timm.cli.train import parse_train_args
from shike_timm.options import options
from shike_timm.publishing.card import METRIC_NAMES, model_card
from shike_timm.training.config import TrainConfig

# huggingface_hub passes files that way.
pytestmark = pytest.mark.filterwarnings('ignore:Use .content=:DeprecationWarning')

NAME = 'tester/digits'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without repositories, which this process is logged in to and whose client does not pause."""
    with LoopbackHub() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.endpoint)
        template = server.endpoint + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        yield server
        server.shutdown()


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / 'run')


@pytest.fixture
def publish(run_script):
    """Publish a run; gives the exit status and the error, which is one sentence."""

    def run(folder, *options, repo_id=NAME):
        status, _, error = run_script('publish.py', folder, '--repo-id', repo_id, *options)
        assert len(error.splitlines()) == (status != 0), error
        return status, error

    return run


def read_files(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    return json.loads((run / 'model' / 'config.json').read_text()), metrics, read_yaml(run / 'args.yaml')


def tiny_card(run, metrics=None, args=None):
    model = timm.create_model(f'local-dir:{run}/model', pretrained=True)
    return model_card(NAME, model, read_files(run)[0], metrics, args)


def block(text, language):
    return text.split(f'```{language}\n')[1].split('```')[0]


def test_card_says_what_the_files_say(tiny_run):
    config, metrics, args = read_files(tiny_run)
    metrics['stage_two'].update(top1=12.34, few=None)
    args.update(data_dir='/home/me/data', seed=1234, pretrained_backbone='/home/me/weights.pth')
    args.update(kd_model_name='local-dir:/home/me/RUN/model/', initial_checkpoint='/home/me/RUN/stage_one/last.pth.tar')
    args.update(train_list='/home/me/train.csv', val_list='/home/me/val.csv', class_map=r'C:\home\me\classes.txt')
    text = str(tiny_card(tiny_run, metrics, args))
    data = ModelCard(text).data
    told = data.to_dict()
    assert (told['library_name'], told['pipeline_tag'], 'license' in told) == ('timm', 'image-classification', False)
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        label: metrics['stage_two'][key] for key, label in METRIC_NAMES.items() if key != 'few'}
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {('digits_lt', 'test')}

    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    for stage, name in (('stage_one', 'one'), ('stage_two', 'two')):
        outputs = [metrics[stage], *metrics[stage]['experts']]
        for output, values in zip(('ensemble', 'expert 0', 'expert 1', 'expert 2'), outputs):
            assert [name, output, *('-' if values[k] is None else f'{values[k]:.2f}' for k in METRIC_NAMES)] in rows
    counts = config['class_counts']
    assert ['classes', '10'] in rows and ['training images', str(sum(counts))] in rows
    shots = [sum(c > 100 for c in counts), sum(20 <= c <= 100 for c in counts), sum(c < 20 for c in counts)]
    assert [int(row[1]) for row in rows if '-shot classes' in row[0]] == shots
    assert 'imbalance factor 20 (exp)' in text

    told = yaml.safe_load(block(text, 'yaml'))
    assert told.pop('pretrained_backbone') == 'weights.pth' and told.pop('kd_model_name') == 'local-dir:RUN/model'
    lists = [told.pop(key) for key in ('initial_checkpoint', 'train_list', 'val_list', 'class_map')]
    assert lists == ['last.pth.tar', 'train.csv', 'val.csv', 'classes.txt']
    assert told['seed'] == 1234 and all(args[key] == value for key, value in told.items())
    assert not re.search(r'home.me', text) and str(tiny_run.parent) not in text
    for dataset, shown in (('hfds//home/me/photos/', 'hfds/photos'), ('hfds/me/photos', 'hfds/me/photos')):
        text = str(tiny_card(tiny_run, metrics, dict(args, dataset=dataset)))
        assert f"\ndataset: {shown}\n" in text and '/home/' not in text
    assert 'Balanced accuracy averages over all classes;' in text


@pytest.mark.parametrize('given, told', [
    ('output/train/mine/', 'mine'),
    (r'local-dir:C:\Users\me\RUN\model', 'local-dir:RUN/model'),
    ('hf-hub:me/net@v1', 'hf-hub:me/net@v1'),
    ('resnet32_shike.cifar100_lt_if100', 'resnet32_shike.cifar100_lt_if100'),
])
def test_what_training_started_from_is_told_without_its_folder(tiny_run, given, told):
    _, metrics, args = read_files(tiny_run)
    recipe = yaml.safe_load(block(str(tiny_card(tiny_run, metrics, dict(args, initial_checkpoint=given))), 'yaml'))
    assert recipe['initial_checkpoint'] == told


def test_card_says_over_how_many_classes_it_averages(tiny_run):
    _, metrics, args = read_files(tiny_run)
    metrics['stage_two']['balanced_classes'] = 8
    text = str(tiny_card(tiny_run, metrics, args))
    assert 'over 8 of 10 classes;' in text and 'The other classes have no images there.' in text


@pytest.mark.parametrize('argv', [
    ['--hparams', str(ROOT / 'hparams' / 'quickstart.yaml'), '--clip-grad', '1', '--clip-mode', 'agc'],
    ['--dataset', 'torch/cifar100', '--train-split', 'train', '--sched', 'step', '--decay-rate', '0.2', '--scale',
     '0.5', '1', '--mean', '0.5', '--drop-path', '0', '--mixup', '0.2', '--alpha', '0', '--mixup-mode', 'elem'],
    ['--kd-model-name', 'hf-hub:me/net@v1', '--distill-loss-weight', '2'],
])
def test_the_recipe_on_the_card_is_that_of_the_run(tiny_run, tmp_path, argv):
    args = vars(parse_train_args(argv))
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(block(str(tiny_card(tiny_run, read_files(tiny_run)[1], args)), 'yaml'))
    again = vars(parse_train_args(['--hparams', str(recipe)]))
    own = {name for name, one in options(TrainConfig).items() if one.card == 'never'}
    assert {key for key, value in args.items() if again[key] != value} <= own


def test_the_code_on_the_card_runs(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((9, 9), 128, dtype=np.uint8)).save('image.png')
    names = {}
    exec(block(str(tiny_card(tiny_run)), 'python').replace(f'hf-hub:{NAME}', f'local-dir:{tiny_run}/model'), names)
    assert names['logits'].shape == (1, 10) and names['experts'].shape == (1, 3, 10)
    assert names['label'] in [str(digit) for digit in range(10)]
    config = dict(read_files(tiny_run)[0], exif=True)
    assert 'ImageOps.exif_transpose(' in str(model_card(NAME, timm.create_model('resnet32_shike'), config))
    grey = timm.create_model('resnet32_shike', in_chans=1)
    assert ".convert('L')" in str(model_card(NAME, grey, read_files(tiny_run)[0]))


def test_cards_of_other_runs(tiny_run):
    _, metrics, args = read_files(tiny_run)
    bare = tiny_card(tiny_run)
    assert 'metrics of this model are not known' in bare.text and 'Recipe' not in bare.text
    assert bare.data.eval_results is None
    assert yaml.safe_load(block(str(tiny_card(tiny_run, metrics, args)), 'yaml'))['crt_epochs'] == 2
    del metrics['stage_two']
    card = ModelCard(str(tiny_card(tiny_run, metrics, dict(args, dataset=''))))
    recipe = yaml.safe_load(block(str(card), 'yaml'))
    assert {key: value for key, value in recipe.items() if 'crt_' in key} == dict(crt_epochs=0)
    assert card.data.eval_results[0].metric_value == metrics['stage_one']['top1']
    assert card.data.eval_results[0].dataset_type == 'imagefolder'
    assert 'a folder of images' in card.text and 'imb_factor' not in card.text and 'imbalance' not in card.text


def test_round_trip(hub, run_copy, publish):
    expected = timm.create_model(f'local-dir:{run_copy}/model', pretrained=True).eval()
    path = run_copy / 'model' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(config, model_args=dict(
        config['model_args'], pretrained_backbone='/home/me/weights.pth'))))  # of a model made in Python
    assert publish(run_copy) == (0, '')
    files = hub.files(NAME)
    assert len(hub.repos[NAME]['commits']) == 2 and not hub.repos[NAME]['private']
    assert set(files) == {'model.safetensors', 'config.json', 'README.md'}
    assert json.loads(files['config.json']) == config
    # as transformers creates it
    timm.create_model(config['architecture'], num_classes=config['num_classes'], **config['model_args'])
    card = ModelCard(files['README.md'].decode())
    assert card.data.eval_results[0].metric_value == read_files(run_copy)[1]['stage_two']['top1']

    shutil.rmtree(run_copy)
    model = timm.create_model(f'hf-hub:{NAME}', pretrained=True).eval()
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model(images), expected(images))
    assert model.pretrained_cfg['label_names'] == expected.pretrained_cfg['label_names']


def test_update_and_visibility(hub, run_copy, publish):
    assert publish(run_copy / 'model', '--private') == (0, '') and hub.repos[NAME]['private']
    before = hub.files(NAME)
    (run_copy / 'metrics.json').unlink()
    status, error = publish(run_copy)
    assert status == 2 and f"'{NAME}' already holds files: add --update" in error and hub.files(NAME) == before
    hub.refusals['create'] = 403, 'This token is for one repository alone.'
    assert publish(run_copy, '--update') == (0, '') and hub.repos[NAME]['private']
    assert b'metrics of this model are not known' in hub.files(NAME)['README.md']
    assert len(hub.repos[NAME]['commits']) == 3
    hub.repos[NAME]['private'] = False
    status, error = publish(run_copy, '--update', '--private')
    assert status == 2 and 'exists and is public' in error and len(hub.repos[NAME]['commits']) == 3


def test_a_dry_run_writes_what_would_be_published(hub, run_copy, publish, tmp_path):
    assert publish(run_copy, '--dry-run', tmp_path / 'dry') == (0, '') and not hub.requests
    assert publish(run_copy) == (0, '')
    published = {name: content for name, content in hub.files(NAME).items() if not name.startswith('.')}
    assert {path.name: path.read_bytes() for path in (tmp_path / 'dry').iterdir()} == published
    status, error = publish(run_copy, '--dry-run', tmp_path / 'dry')
    assert status == 2 and 'dry' in error


def test_license(hub, run_copy, publish):
    path = run_copy / 'model' / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg']['license'] = 'cc-by-nc-4.0'  # of weights it started from
    path.write_text(json.dumps(config))
    for argv, expected in (([], 'cc-by-nc-4.0'), (['--license', 'mit', '--update'], 'mit')):
        assert publish(run_copy, *argv) == (0, '')
        assert ModelCard(hub.files(NAME)['README.md'].decode()).data.license == expected
    status, error = publish(run_copy, '--license', 'Free', repo_id='tester/other')
    assert status == 2 and 'check that --license is one of' in error and 'tester/other' not in hub.repos


def write_tables(folder, config, top1):
    """What publishing takes of a report."""
    folder.mkdir()
    rows = ['class,training images,test images,ensemble,most confused with']
    rows += [f'{name},{count},50,{top1},a|b' for name, count in zip(config['label_names'], config['class_counts'])]
    (folder / 'classes.csv').write_text('\n'.join(rows))
    for name in ('class_counts.png', 'class_accuracy.png'):
        (folder / name).write_bytes(f'png of {name}'.encode())


def test_a_report_goes_along(hub, run_copy, tmp_path, publish):
    config, metrics, _ = read_files(run_copy)
    top1 = metrics['stage_two']['top1']
    write_tables(run_copy / 'report', config, top1)
    write_tables(tmp_path / 'counts', dict(config, class_counts=config['class_counts'][::-1]), top1)
    write_tables(tmp_path / 'other', config, top1 + 1)
    for folder, message in (
            ('nowhere', 'does not exist'), ('counts', 'training images are not those'), ('other', 'top-1 is')):
        status, error = publish(run_copy, '--report', tmp_path / folder)
        assert status == 2 and message in error and not hub.requests
    assert publish(run_copy) == (0, '')
    files = hub.files(NAME)
    assert len(files) == 6 and files['class_accuracy.png'] == b'png of class_accuracy.png'
    assert files['classes.csv'] == (run_copy / 'report' / 'classes.csv').read_bytes()
    links = re.findall(r'\]\((\w+\.(?:png|csv))\)', files['README.md'].decode())
    assert links == ['class_accuracy.png', 'classes.csv', 'class_counts.png']
    row = f"| {config['label_names'][0]} | {config['class_counts'][0]} | 50 | {top1} | a\\|b |"
    assert row in files['README.md'].decode()
    (run_copy / 'report' / 'classes.csv').write_text('class\nant')
    status, error = publish(run_copy)
    assert status == 2 and "classes.csv' is damaged" in error


@pytest.mark.parametrize('route, refusal, expected, sentence', [
    ('create', (401, 'Invalid username or password.'), 2, 'The Hub refused the token (401: Invalid username'),
    ('create', (403, 'No rights'), 2, f"does not let this token write to '{NAME}' (403: No rights)"),
    ('info', (404, 'Repository not found', 'RepoNotFound'), 2, f"'{NAME}' is taken, or this token cannot see it"),
    ('lfs_batch', (403, 'Private storage limit reached.'), 2, 'storage limit reached): choose'),
    ('validate', (500, ''), 1, 'failed (500: Internal Server Error): look at http://'),
    ('create', (429, 'Slow down'), 1, 'failed (429: Slow down): look at http://'),
    ('lfs_upload', (500, 'Broken'), 1, 'failed (500: Broken): look at http://'),
    ('commit', (412, 'A commit has happened since.'), 1, 'failed (412: A commit has happened since): look at http://'),
])
def test_refusals_of_the_hub(hub, tiny_run, publish, route, refusal, expected, sentence):
    hub.refusals[route] = refusal
    status, error = publish(tiny_run)
    assert status == expected and sentence in error and not hub.files(NAME)
    hub.refusals.clear()
    assert publish(tiny_run) == (0, '') and len(hub.files(NAME)) == 3


def test_the_way_to_the_hub(hub, tiny_run, publish, unused_port, monkeypatch):
    status, error = publish(tiny_run, repo_id='other/digits')
    assert status == 2 and "write to 'other/digits' (403: You don't have the rights" in error and not hub.repos
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{unused_port}')
    status, error = publish(tiny_run)
    assert status == 1 and f'Publishing to http://127.0.0.1:{unused_port} failed (' in error
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    status, error = publish(tiny_run)
    assert status == 2 and 'HF_HUB_OFFLINE is set' in error


def test_bad_arguments_are_refused_before_the_first_request(hub, run_copy, publish, monkeypatch):
    for repo_id in ('digits', 'a/b/c', 'tester/my digits', 'tester/..', '/digits', ''):
        status, error = publish(run_copy, repo_id=repo_id)
        assert status == 2 and f"--repo-id '{repo_id}' cannot be a name on the Hub" in error
    for token in ('', 'hf_sec\x0bret', 'hf_s\u00e9cret'):
        monkeypatch.setenv('HF_TOKEN', token)
        status, error = publish(run_copy)
        assert status == 2 and 'There is no token for the Hub' in error and 'cret' not in error
    for folder in (run_copy / 'gone', run_copy / 'args.yaml', run_copy / 'stage_one'):
        status, error = publish(folder)
        assert status == 2 and f"'{folder}' holds no model" in error
    (run_copy / 'metrics.json').write_text('{"top1": ')
    status, error = publish(run_copy)
    assert status == 2 and "metrics.json' cannot be read as JSON" in error
    (run_copy / 'model' / 'model.safetensors').write_bytes(b'no weights')
    (run_copy / 'metrics.json').unlink()
    status, error = publish(run_copy)
    assert status == 2 and f"model 'local-dir:{run_copy}/model' cannot be loaded" in error
    assert not hub.requests
