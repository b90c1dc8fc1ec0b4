"""A model folder in the package transformers, where it is installed."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from shike_timm.pretrained.folder import export_model, read_config
from shike_timm.publishing.card import model_card


@pytest.mark.slow
def test_pipeline(tmp_path):
    transformers = pytest.importorskip('transformers')
    model = timm.create_model('resnet32_shike', pretrained=True).eval()
    names = list(model.pretrained_cfg['label_names'])
    config = timm.data.resolve_model_data_config(model)
    export_model(model, tmp_path / 'model', config, names, model.class_counts)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    told = transformers.pipeline('image-classification', model=str(tmp_path / 'model'))(image, top_k=3)
    with torch.inference_mode():
        expected = model(timm.data.create_transform(**config)(image)[None]).softmax(-1)[0].topk(3)
    assert [one['label'] for one in told] == [names[c] for c in expected.indices]
    assert [one['score'] for one in told] == pytest.approx(expected.values.tolist(), abs=1e-4)
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(tmp_path / 'image.png')
    card = str(model_card('me/net', model, read_config(f'local-dir:{tmp_path}/model')))
    code = card.split('```python\n')[2].split('```')[0]
    exec(code.replace("'me/net'", repr(str(tmp_path / 'model'))).replace('image.png', str(tmp_path / 'image.png')), {})
