#!/usr/bin/env python3
"""A page in the browser that tries a model: `pip install -e ".[app]" && python app.py --model output/train/mine`.

On a Space of the Hugging Face Hub this file is the app. There SHIKE_MODEL names the model.
"""
import argparse
import os
import sys
import tempfile
from typing import Any, Dict, List, Tuple

import gradio as gr
import timm.data
import torch
from PIL import Image

from shike_timm.errors import InputError
from shike_timm.pretrained.load import load_trained_model
from shike_timm.report.cam import draw_cams

TOP = 5  # Classes that are shown.


class Demo:
    """A model, and what the page shows for an image."""

    def __init__(self, name: str):
        self.trained = load_trained_model(name, None, True, None)
        self.model = self.trained.model.eval()
        self.names = self.trained.class_names or [str(c) for c in range(self.model.num_classes)]
        self.data_config = timm.data.resolve_model_data_config(self.model)
        self.has_maps = self.model.feature_info[-1].get('has_map', True)  # Pooled features have none.
        self.transform = timm.data.create_transform(**self.data_config, is_training=False)

    def _probabilities(self, logits: torch.Tensor) -> Dict[str, float]:
        values, classes = logits.softmax(-1).topk(min(TOP, len(self.names)))
        return {self.names[c]: value for c, value in zip(classes.tolist(), values.tolist())}

    def look(self, image: Image.Image, prior: str) -> Tuple[Dict[str, float], List[List[Any]], List[Any]]:
        """Probabilities of the average, a row for each expert, and pictures of where each expert looks."""
        if image is None:
            raise gr.Error('Choose an image first.')
        self.model.set_target_prior(None if prior == 'as the model is' else prior)
        image = image.convert('RGB')
        with torch.inference_mode():
            logits = self.model.forward_experts(self.transform(image)[None])[0]
        rows = []
        for m, one in enumerate(logits, 1):
            shares = self._probabilities(one)
            rows.append([f'expert {m}', *(f'{name} {100 * share:.0f} %' for name, share in list(shares.items())[:3])])
        maps = []
        if self.has_maps:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, 'image.png')
                image.save(path)
                drawn = draw_cams(self.model, [path], self.data_config, self.names)[0]['experts']
            maps = [(one['image'], f'expert {m}') for m, one in enumerate(drawn, 1)]
        return self._probabilities(logits.mean(0)), rows, maps

    def page(self) -> gr.Blocks:
        """The page."""
        priors = ['as the model is', *(('uniform', 'train') if self.model.class_counts else ())]
        with gr.Blocks(title='SHIKE') as blocks:
            gr.Markdown('# SHIKE\nAn image, what each expert says, and where it looks.')
            with gr.Row():
                with gr.Column():
                    image = gr.Image(type='pil', label='Image')
                    prior = gr.Radio(priors, value=priors[0], label='How frequent classes are in use')
                    button = gr.Button('Classify', variant='primary')
                with gr.Column():
                    label = gr.Label(num_top_classes=TOP, label='All experts')
                    table = gr.Dataframe(headers=['', 'first', 'second', 'third'], label='Each expert')
                    gallery = gr.Gallery(label='Where each expert looks', columns=3, visible=self.has_maps)
            outputs = [label, table, gallery]
            button.click(self.look, [image, prior], outputs)
            prior.input(self.look, [image, prior], outputs)
        return blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get('SHIKE_MODEL', 'resnet32_shike')
    parser.add_argument('--model', default=default, help='as shike predict takes it')
    parser.add_argument('--port', type=int, default=7860)
    args = parser.parse_args()
    try:
        page = Demo(args.model).page()
    except InputError as error:
        print(f'app.py: {error}', file=sys.stderr)
        return 2
    page.launch(server_name=os.environ.get('GRADIO_SERVER_NAME', '127.0.0.1'), server_port=args.port)
    return 0


if __name__ == '__main__':
    sys.exit(main())
