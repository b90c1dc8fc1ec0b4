"""Where each expert looks: class activation maps of images that somebody names, by the grad-cam library."""
import os
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.image_files import create_file_loader, find_images
from ..errors import InputError
from ..models import Shike

__all__ = ['expert_maps', 'look_at']

BATCH = 32


class _OneExpert(nn.Module):
    """The logits [B, classes] of one expert."""

    def __init__(self, model: Shike, expert: int):
        super().__init__()
        self.model = model
        self.expert = expert

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_experts(images)[:, self.expert]


def expert_maps(model: Shike, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM of each expert's fused features for a class of each image.

    Args:
        model: The model; its gradients are left empty.
        images: Normalised images [B, C, H, W] on its device.
        classes: A class of each image [B].

    Returns:
        Maps [B, M, H, W] from 0 to 1.
    """
    from pytorch_grad_cam import GradCAM  # pyright: ignore[reportMissingImports]  # an extra
    from pytorch_grad_cam.utils.model_targets import (  # pyright: ignore[reportMissingImports]
        ClassifierOutputTarget,
    )
    targets: List[Any] = [ClassifierOutputTarget(one) for one in classes]
    maps = []
    for m, expert in enumerate(model.experts):
        with GradCAM(_OneExpert(model, m), [expert]) as cam:
            maps.append(cam(images, targets))
    model.zero_grad()
    return np.stack(maps, axis=1)


def _overlay(image: np.ndarray, heat: np.ndarray) -> Image.Image:
    from pytorch_grad_cam.utils.image import show_cam_on_image  # pyright: ignore[reportMissingImports]
    return Image.fromarray(show_cam_on_image(image.astype(np.float32) / 255, heat, use_rgb=True))


def look_at(
        model: Shike,
        names: Sequence[str],
        data_config: Dict[str, Any],
        class_names: Optional[Sequence[str]] = None,
        **decoding: Any,
) -> List[Dict[str, Any]]:
    """What a page shows of images by name: each as the model sees it, and where each expert looks.

    Args:
        model: The model.
        names: Files, folders and patterns.
        data_config: What `timm.data.resolve_data_config` gives.
        class_names: Names of the classes.
        **decoding: How files are decoded, as for `create_file_loader`.

    Returns:
        A row an image: its `name`, the `image`, the class that the ensemble says, `said`, the `share` that it gives
        it, and of the `experts` their `image` with the map on it and the `share` that each gives this class.

    Raises:
        InputError: If there is no image, or one cannot be read.
    """
    paths, rows = find_images(names), []
    device = next(model.parameters()).device
    mean, std = (
        torch.tensor(data_config[key], device=device).expand(model.in_chans)[:, None, None] * 255
        for key in ('mean', 'std'))
    model.eval()
    for pixels, errors in create_file_loader(paths, data_config, BATCH, 0, **decoding):
        for path, error in zip(paths[len(rows):], errors):
            if error:
                raise InputError(f"--cam: image '{path}' cannot be read ({error}): leave it out.")
        assert pixels is not None  # as there is no error
        images = (pixels.to(device, torch.float32) - mean) / std
        with torch.no_grad():
            logits = model.forward_experts(images).float()
        said = logits.mean(1).argmax(-1)
        shares = torch.cat([logits.mean(1, keepdim=True), logits], dim=1).softmax(-1)
        shares = shares[torch.arange(len(said)), :, said].tolist()
        maps = expert_maps(model, images, said.tolist())
        for image, heats, c, (share, *own) in zip(pixels.permute(0, 2, 3, 1).numpy(), maps, said.tolist(), shares):
            image = np.broadcast_to(image, (*image.shape[:2], 3))
            rows.append(dict(
                name=os.path.basename(paths[len(rows)]).encode('utf-8', 'replace').decode(),
                image=Image.fromarray(np.ascontiguousarray(image)), said=class_names[c] if class_names else str(c),
                share=share, experts=[
                    dict(image=_overlay(image, heat), share=one) for heat, one in zip(heats, own)]))
    return rows
