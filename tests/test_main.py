"""`python -m shike_timm SCRIPT.py` registers the models and runs a script of others, such as timm's validate.py."""
import re
import shlex
import sys

import pytest
import torch

from shike_timm.__main__ import main
from shike_timm.cli import describe
from shike_timm.cli.train import EXAMPLES
from shike_timm.options import read_command_line
from shike_timm.training.config import TrainConfig

SCRIPT = """
import argparse
import helper
from timm.models import create_model, resolve_model_input_args

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--num-classes', type=int)
if __name__ == '__main__':
    args = parser.parse_args()
    model = create_model(**resolve_model_input_args(args.model, vars(args), num_classes=args.num_classes))
    print(type(model).__name__, model.num_classes, parser.prog, helper.WORD)
"""


def test_scripts_of_others(tmp_path, monkeypatch, capsys):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    (tmp_path / 'helper.py').write_text("WORD = 'beside'\n")
    monkeypatch.setattr(sys, 'path', list(sys.path))
    argv = ['__main__.py', str(tmp_path / 'validate.py'), '--model', 'resnet32_shike', '--num-classes', '7']
    monkeypatch.setattr(sys, 'argv', argv)
    main()
    assert capsys.readouterr().out.split() == ['Shike', '7', 'validate.py', 'beside']
    monkeypatch.setattr(sys, 'argv', ['__main__.py', 'nowhere.py'])
    with pytest.raises(SystemExit, match="'nowhere.py' is no script"):
        main()


def test_memory_that_runs_out_is_one_sentence(tmp_path, run_script, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError('CUDA out of memory.')

    monkeypatch.setattr(describe, 'open_dataset', fail)
    status, _, told = run_script('describe', '--data-dir', tmp_path)
    assert status == 1 and told.count('\n') == 1 and '--grad-accum-steps' in told


@pytest.mark.parametrize('name', ['train', 'retrain_classifier', 'eval'])
def test_scripts_of_the_clone_are_commands(run_script, name):
    command = name.replace('_', '-')
    for script, called in ((f'{name}.py', f'{name}.py'), (command, f'shike {command}')):
        status, _, error = run_script(script, '--unknown')
        assert status == 2 and error.startswith(f'{called}: error: ') and len(error.splitlines()) == 1


def test_the_help_of_training_begins_with_examples(run_script):
    status, out, _ = run_script('train', '--help')
    assert status == 0 and out.count('  shike train') == 3 and out.index('shike train --data-dir photos\n') < 200
    above = out[out.index('The options above:'):].split('\n\n')[0]
    assert len(re.findall(r'^  -', above, re.M)) == 13  # a dozen, and --no-resume
    assert out.count('--data-dir DIR') == 1 and out.index('--data-dir DIR') < out.index('Data:')
    for example in EXAMPLES:
        assert read_command_line(TrainConfig, '', shlex.split(example.replace('\\\n', ' '))[2:])['data_dir'] == 'photos'
