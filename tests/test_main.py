"""`python -m shike_timm SCRIPT.py` registers the models and runs a script of others, such as timm's validate.py."""
import sys

import pytest
import torch

from shike_timm.__main__ import main
from shike_timm.cli import describe

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
