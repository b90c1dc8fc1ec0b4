"""The command `shike`. It lists the commands and imports the one that runs.

Importing the package takes seconds, because it registers models with timm. So this file lies beside it.
"""
import difflib
import importlib
import re
import sys
from pathlib import Path

COMMANDS = {
    'train': 'train a model: stage one, then classifier retraining',
    'retrain-classifier': 'retrain the classifiers of a stage-one checkpoint: stage two alone',
    'eval': 'evaluate a model on many-, medium- and few-shot classes',
    'predict': 'predict the classes of image files',
    'describe': 'describe a data set: classes, counts, sizes, duplicates, unreadable files',
    'report': 'draw a report of a run, or of saved logits, and compare several',
    'export': 'export a model to a file that runs without this package',
    'publish': 'publish a trained model and its card to the Hugging Face Hub',
}


def main() -> int:
    """Run the command that the command line names. Returns the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ''
    if name == '--version':
        version = Path(__file__).with_name('shike_timm') / 'version.py'
        print('shike-timm', re.findall(r"'(.+)'", version.read_text(encoding='utf-8'))[0])
        return 0
    if name in ('', '-h', '--help', 'help'):
        print('usage: shike COMMAND ...\n\nSHIKE, long-tailed visual recognition with timm.\n\ncommands:')
        for command, what in COMMANDS.items():
            print(f'  {command:20}{what}')
        print("\n'shike COMMAND --help' lists the options of a command, 'shike --version' tells the version.")
        return 0 if name else 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f", the nearest one is '{near[0]}'" if near else ''
        print(f"shike: error: '{name}' is not a command{meant}: choose {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    sys.argv[:2] = [f'shike {name}']  # the name in help texts and messages
    return importlib.import_module(f"shike_timm.cli.{name.replace('-', '_')}").main()


if __name__ == '__main__':
    sys.exit(main())
