"""Publishing to the Hugging Face Hub."""
from functools import partial

from ..options import parse
from ..publishing.hub import PublishConfig, publish
from .script import run_script

parse_publish_args = partial(
    parse, PublishConfig, 'Publish a trained model and its card to the Hugging Face Hub.')


CONFIG = PublishConfig


def main() -> int:
    return run_script(lambda: publish(parse_publish_args()))
