"""Documents: what scripts make is as they make it, links lead somewhere, and the blocks of Python run."""
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'docs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_python_is_made_from_the_docstrings():
    assert (ROOT / 'docs' / 'api.md').read_text() == script('api').page()


def test_operations_of_the_pictures_are_those_of_the_models():
    import timm
    import torch

    import shike_timm
    from shike_timm.costs import count_flops

    def operations(model, size):
        with torch.inference_mode():
            return count_flops(lambda: model.eval()(torch.zeros(1, 3, size, size)))

    told, lite0 = script('figures').OPERATIONS, 'tf_efficientnet_lite0'
    assert told['resnet32'] == pytest.approx(
        operations(timm.create_model('resnet32_shike'), 32)
        / operations(timm.create_model('resnet32_shike', num_experts=1, fusion=False), 32), rel=0.02)
    assert told['lite0'] == pytest.approx(
        operations(shike_timm.shike(lite0, aligner='separable'), 64)
        / operations(timm.create_model(lite0), 64), rel=0.02)


def test_pictures_are_as_the_script_draws_them(tmp_path, monkeypatch):
    figures = script('figures')
    monkeypatch.setattr(figures, 'FOLDER', tmp_path)
    for path in figures.main():
        assert path.read_text() == (ROOT / 'docs' / 'figures' / path.name).read_text()


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading).strip().lower().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r'(?:\]\(|src="|srcset=")([^)"#:]*)#?([^)":]*)[)"]', text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor and path.suffix == '.md':
            assert anchor in anchors(path), f'{target}#{anchor}'


def test_the_modules_of_the_design_exist():
    text = (ROOT / 'docs' / 'design.md').read_text()
    known = {path.name for path in ROOT.glob('*.py')} | {path.name for path in (ROOT / 'shike_timm').rglob('*.py')}
    named = {name.split('/')[-1] for name in re.findall(r'`([\w/]+\.py)`', text) if not (ROOT / name).exists()}
    assert named <= known, named - known


def test_the_python_of_the_readme_runs():
    block = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[0]
    found = {}
    exec(block, found)
    assert found['logits'].shape == (4, 100) and found['experts'].shape == (4, 3, 100)


def test_the_pictures_to_try_have_a_long_tail(tmp_path):
    photographs = script('photographs')
    subprocess.run([sys.executable, photographs.__file__, tmp_path], check=True)
    counts = [len(list((tmp_path / kind).iterdir())) for kind in photographs.CLASSES]
    assert counts == sorted(counts, reverse=True) and (counts[0], counts[-1]) == (400, 10)


@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    for name in ('tour.ipynb', 'photographs.py'):
        shutil.copy(ROOT / 'docs' / name, tmp_path)
    notebook = nbformat.read(tmp_path / 'tour.ipynb', 4)
    nbclient.NotebookClient(notebook, timeout=900, resources=dict(metadata=dict(path=str(tmp_path)))).execute()


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip('material')
    subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', tmp_path], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_app_shows_what_the_model_says(tiny_run):
    pytest.importorskip('gradio')
    from PIL import Image
    sys.path.insert(0, str(ROOT))
    from app import Demo
    demo = Demo(str(tiny_run))
    label, rows, maps = demo.look(Image.new('RGB', (8, 8), 'white'), 'as the model is')
    other, _, _ = demo.look(Image.new('RGB', (8, 8), 'white'), 'train')
    assert len(rows) == len(maps) == 3 and abs(sum(label.values())) <= 1.001 and label != other
