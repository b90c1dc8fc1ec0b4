"""Publishing to the Hugging Face Hub."""
from functools import partial

from ..options import parse
from ..publishing.hub import PublishConfig, publish
from .script import run_script

CONFIG = PublishConfig
parse_publish_args = partial(parse, CONFIG, 'Publish a trained model and its card to the Hugging Face Hub.')


def main() -> int:
    return run_script(lambda: publish(parse_publish_args()))
