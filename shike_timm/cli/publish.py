"""Publishing to the Hugging Face Hub."""
from functools import partial

from ..options import parse
from ..publishing.hub import PublishConfig, publish
from .script import command

CONFIG = PublishConfig
parse_publish_args = partial(parse, CONFIG, 'Publish a trained model and its card to the Hugging Face Hub.')
main = command(publish, parse_publish_args)
