"""Class activation maps show where each expert looks in an image. The grad-cam library makes them."""
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.image_files import create_file_loader, find_images, normalize
from ..errors import InputError
from ..models import Shike
from ..models.experts import to_map
from ..options import option

BATCH_SIZE = 32


@dataclass(frozen=True)
class CamConfig:
    """Class activation maps."""

    cam: Optional[List[str]] = option(
        None, 'images, folders or patterns. The report shows where each expert looks in these images', 'IMAGE',
        nargs='+')


def _target_layer(model: Shike, expert: nn.Module) -> nn.Module:
    """The module whose output a map shows: the fused features, or what the last block of an expert attends to.

    If only the class token is classified, the other tokens of the last block have no gradient.
    """
    norms = [module for name, module in expert.named_modules() if name.endswith('.norm1')]
    return norms[-1] if norms and model.default_pool == 'token' else expert


def expert_maps(model: Shike, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM [B, M, H, W] of each expert's fused features, for one class of each normalized image, from 0 to 1."""
    from pytorch_grad_cam import GradCAM  # pyright: ignore[reportMissingImports]
    from pytorch_grad_cam.utils import model_targets  # pyright: ignore[reportMissingImports]
    level = model.feature_info[-1]
    if not level.get('has_map', True):
        raise InputError(
            "--cam: the experts' features do not lie in the order of the image, so there are no maps: leave it out.")
    targets: List[Any] = [model_targets.ClassifierOutputTarget(one) for one in classes]
    maps = []
    for expert in model.experts:  # The mean over experts scales their gradients, but maps have no scale.
        with GradCAM(
                model, [_target_layer(model, expert)],
                reshape_transform=lambda x: to_map(x, level, images.shape[2:])) as cam:
            maps.append(cam(images, targets))
    model.zero_grad()
    return np.stack(maps, axis=1)


def draw_cams(
        model: Shike, names: Sequence[str], data_config: Dict[str, Any], class_names: Optional[Sequence[str]] = None,
        **decoding: Any,
) -> List[Dict[str, Any]]:
    """Maps of each expert for the class that the ensemble predicts.

    Returns a row for each image: its file `name`, the `image` as the model sees it, the predicted class `label` and its
    probability `prob`. For each of the `experts` the row has the `image` under the expert's map, and the probability
    `prob` that the expert gives the predicted class.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image  # pyright: ignore[reportMissingImports]
    paths, rows = find_images(names), []
    device = next(model.parameters()).device
    model.eval()
    for pixels, errors in create_file_loader(paths, data_config, BATCH_SIZE, 0, **decoding):
        for path, error in zip(paths[len(rows):], errors):
            if error:
                raise InputError(f"--cam: image '{path}' cannot be read ({error}): leave it out.")
        assert pixels is not None  # Without an error there is always an image.
        images = normalize(pixels, data_config, device)
        with torch.no_grad():
            logits = model.forward_experts(images).float()
        classes = logits.mean(1).argmax(-1)
        probs = torch.cat([logits.mean(1, keepdim=True), logits], dim=1).softmax(-1)
        probs = probs[torch.arange(len(classes)), :, classes].tolist()
        maps = expert_maps(model, images, classes.tolist())
        for image, heats, c, (prob, *own) in zip(pixels.permute(0, 2, 3, 1).numpy(), maps, classes.tolist(), probs):
            image = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
            drawn = [show_cam_on_image(image.astype(np.float32) / 255, heat, use_rgb=True) for heat in heats]
            rows.append(dict(
                name=os.path.basename(paths[len(rows)]).encode('utf-8', 'replace').decode(),
                image=Image.fromarray(image), label=class_names[c] if class_names else str(c), prob=prob,
                experts=[dict(image=Image.fromarray(one), prob=p) for one, p in zip(drawn, own)]))
    return rows
