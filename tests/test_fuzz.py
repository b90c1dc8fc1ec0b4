"""Five hundred damaged files: each is used or refused in one sentence, within ten seconds, and nothing else changes."""
import io
import json
import logging
import random
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
import yaml
from test_bad_input import snapshot

COUNTS = dict(config=120, args=100, metrics=60, lists=100, tars=70, npz=50)
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 10 ** 6, 10 ** 30, -0.5, 1e308, float('nan'), float('inf'), '', 'x',
    '../..', 'é' * 400, 'pipe:touch touched', 'file:///etc/passwd', '/dev/zero', [], [[]], [1, 'a'], [None] * 3,
    ['a'] * 10, [1e-300] * 3, {}, {'a': {'b': []}}, '\0', 'hf-hub:', 'local-dir:/', '= 1', '%s{0}']


def places(values):
    """Every container in nested values, with each of its keys."""
    for key in values if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], (dict, list)) and values[key]:
            yield from places(values[key])


def mutate_values(rng, values):
    """Nested values with one to three of them replaced, removed, moved or doubled."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(values))
        if not found:
            break
        # Places are drawn by their depth, since most of them are in long lists.
        inside, key = rng.choice([one for one in found if isinstance(one[0], dict)] if rng.random() < 0.7 else found)
        change = rng.randrange(6)
        if change == 0:
            del inside[key]
        elif change == 1 and isinstance(inside, dict):
            inside[rng.choice(('x', '', str(key).upper(), 'class_counts', 'num_classes'))] = inside.pop(key)
        elif change == 2 and isinstance(inside[key], list):
            inside[key] = inside[key] * 2
        elif change == 3:
            inside[key] = [inside[key]]
        else:
            inside[key] = rng.choice(VALUES)
    return values


def mutate_bytes(rng, content):
    """Content that is cut, emptied, overwritten, doubled, or gets bytes in between."""
    content, place = bytearray(content), rng.randrange(len(content) + 1)
    change = rng.randrange(7)
    if change == 0:
        return bytes(content[:place])
    if change == 1:
        return rng.choice((b'', b'\0' * 600, b'[' * 9000, b'{"a":' * 3000, b'\xff\xfe', b'\n\n\n', b'- - - -'))
    if change == 2:
        return bytes(content[:place] + rng.randbytes(rng.randrange(1, 40)) + content[place:])
    if change == 3:
        return bytes(content[:place] + content[place // 2:])
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def mutate_lines(rng, content):
    """Lines that are doubled, dropped, joined, or have another part in place of one of theirs."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 2, 5))):
        place, change = rng.randrange(len(lines)), rng.randrange(5)
        if change == 0:
            lines.insert(rng.randrange(len(lines)), lines[place])
        elif change == 1 and len(lines) > 1:
            del lines[place]
        else:
            mark = next((one for one in (',', '\t', ' ') if one in lines[place]), ' ')
            parts = lines[place].split(mark)
            parts[rng.randrange(len(parts))] = rng.choice((
                '', 'x', '/dev/zero', '/etc/passwd', '../..', '"', '""', '-1', '9' * 400, 'a/' * 300, '\0', 'é', mark))
            lines[place] = mark.join(parts)
    return '\n'.join(lines).encode()


@pytest.fixture
def limited():
    """A function that lets another one run for ten seconds of this process, and not wait for more than a minute."""
    def stop(signum, frame):
        raise AssertionError('it waits')

    def call(function, *args):
        start = time.process_time()
        signal.alarm(60)
        try:
            result = function(*args)
        finally:
            signal.alarm(0)
        assert time.process_time() - start < 10
        return result

    before = signal.signal(signal.SIGALRM, stop)
    logging.disable()  # pytest-xdist cannot send names that are not text.
    yield call
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGALRM, before)


def list_files(root):
    """Lists of the images of a folder in every format, by name."""
    rows = [(str(path.relative_to(root)), path.parent.name) for path in sorted(root.rglob('*.png'))]
    names = sorted({label for _, label in rows})
    coco = dict(
        images=[dict(id=i, file_name=path, group=i // 2) for i, (path, _) in enumerate(rows)],
        annotations=[dict(image_id=i, category_id=names.index(label)) for i, (_, label) in enumerate(rows)],
        categories=[dict(id=i, name=name) for i, name in enumerate(names)])
    return {
        'list.csv': 'path,label\n' + ''.join(f'{path},{label}\n' for path, label in rows),
        'list.tsv': 'path\tlabel\tgroup\n' + ''.join(f'{path}\t{label}\tg{len(path)}\n' for path, label in rows),
        'list.txt': ''.join(f'{path} {label}\n' for path, label in rows), 'list.json': json.dumps(coco)}


def make_tar(root, shards):
    """A tar archive of the images of a folder, or of samples with their labels."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for i, path in enumerate(sorted(root.rglob('*.png'))):
            if not shards:
                tar.add(path, str(path.relative_to(root)))
                continue
            for name, text in ((f'{i}.png', path.read_bytes()), (f'{i}.cls', path.parent.name.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return content.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize('kind', COUNTS)
def test_damaged_files(kind, tiny_run, image_folder, run_script, tmp_path, limited, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('shike_timm.report.page.DRAWINGS', {})  # Drawing takes most of the time.
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    inputs, output = tmp_path / 'inputs', tmp_path / 'output'
    run = shutil.copytree(tiny_run, inputs / 'run')
    plain = ['--workers', '0', '--device', 'cpu']
    digits = ['--dataset', 'digits_lt', '--imb-factor', '20', *plain]
    publish = ['publish', run, '--repo-id', 'a/b']
    if kind == 'npz':
        run_script('eval', '--model', run, *digits, '--save-logits', inputs / 'logits.npz')
        arrays = dict(np.load(inputs / 'logits.npz'))
    lists = list_files(image_folder)
    tars = [make_tar(image_folder, shards) for shards in (False, True)]
    (inputs / 'wds').mkdir()
    seen = []
    for number in range(COUNTS[kind]):
        rng = random.Random(f'{kind} {number}')
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        if kind in ('config', 'args', 'metrics'):
            path = run / dict(config='model/config.json', args='args.yaml', metrics='metrics.json')[kind]
            good = path.read_bytes()
            if rng.random() < 0.25:
                path.write_bytes(mutate_bytes(rng, good))
            elif kind == 'args':
                path.write_text(yaml.safe_dump(mutate_values(rng, yaml.safe_load(good))))
            else:
                path.write_text(json.dumps(mutate_values(rng, json.loads(good))))
            predict = ['predict', image_folder / 'validation' / 'ant', '--model', run, *plain]
            resume = ['train', '--resume', 'COPY', *plain]
            report = ['report', run, '--output', output / 'report', *plain]
            command = rng.choice(dict(
                metrics=[publish, resume], config=[predict, ['eval', '--model', run, *digits], publish],
                args=[report, resume, publish])[kind])
            if 'COPY' in command:
                command[2] = shutil.copytree(run, output / 'run')
        elif kind == 'lists':
            name, text = rng.choice(list(lists.items()))
            path, good = inputs / name, None
            if name == 'list.json' and rng.random() < 0.7:
                path.write_text(json.dumps(mutate_values(rng, json.loads(text))))
            else:
                path.write_bytes((mutate_lines if rng.random() < 0.7 else mutate_bytes)(rng, text.encode()))
            command = [
                'describe', '--data-dir', image_folder, rng.choice(('--train-list', '--val-list')), path,
                '--no-perceptual', '--workers', '0', *rng.choice(([], ['--group-key', 'group']))]
        elif kind == 'tars':
            shards = rng.random() < 0.4
            path, good = inputs / ('wds/train.tar' if shards else 'images.tar'), None
            path.write_bytes(mutate_bytes(rng, tars[shards]))
            data = ['--dataset', 'wds/', '--train-split', 'train.tar', '--data-dir', inputs / 'wds'] if shards else [
                '--data-dir', path]
            command = ['describe', *data, '--no-perceptual', '--workers', '0']
        else:
            path, good = inputs / 'bad.npz', None
            if rng.random() < 0.4:
                path.write_bytes(mutate_bytes(rng, (inputs / 'logits.npz').read_bytes()))
            else:
                name, change, value = rng.choice(list(arrays)), rng.randrange(4), rng.choice((-1, 2, 7, np.nan, 'x'))
                array = arrays[name]
                changed = np.array(value)
                if change == 1 and array.ndim:
                    changed = array[1:]
                elif change == 2 and array.dtype.kind in 'iuf' and value in (-1, 2, 7):
                    changed = np.full_like(array, value)
                elif change == 3:
                    changed = array.astype(bytes)
                np.savez(path, **{**arrays, name: changed})
            command = ['report', path, '--output', output / 'report']
        before = snapshot(inputs), snapshot(image_folder)
        try:
            status, out, error = limited(run_script, *command)
        except BaseException as raised:
            raise AssertionError(f'{kind} {number}: {command} of {path.read_bytes()[:3000]}') from raised
        assert status in (0, 2) and 'Traceback' not in error, (kind, number, status, error)
        if status == 2:
            assert error.strip().splitlines()[-1].startswith('shike '), (kind, number, error)
        assert (snapshot(inputs), snapshot(image_folder)) == before, (kind, number)
        assert not (tmp_path / 'touched').exists()
        if good is not None:
            path.write_bytes(good)
        seen.append(status)
    assert set(seen) == {0, 2}  # Some are used, and some are refused.
