"""Experts, and the aligners that bring a shared stage's feature map to the shape of an expert's own output."""
import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone, is_column

BOTTLENECK = 256  # Channels inside an aligner.


def _conv_norm(
        in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, groups: int = 1, **dd: Any) -> List[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False, **dd)
    return [conv, nn.BatchNorm2d(out_chs, **dd)]


def conv_aligner(in_chs: int, out_chs: int, num_halvings: int, **dd: Any) -> nn.Sequential:
    """The paper's aligner: strided 3x3 convolutions that double the channels, each with BatchNorm and ReLU."""
    layers = []
    num_links = max(num_halvings, 1)  # At equal resolution, one convolution without stride is left.
    for k in range(num_links):
        width = out_chs if k == num_links - 1 else in_chs * 2
        layers += _conv_norm(in_chs, width, 3, stride=2 if num_halvings else 1, **dd)
        if k != 1:  # As in the authors' code, no ReLU follows the second convolution.
            layers.append(nn.ReLU(inplace=True))
        in_chs = width
    return nn.Sequential(*layers)


def bottleneck_aligner(
        in_chs: int, out_chs: int, num_halvings: int, depthwise: bool = False, **dd: Any) -> nn.Sequential:
    """A 1x1 convolution to 256 channels, strided 3x3 convolutions (depthwise on request), and a 1x1 convolution."""
    width, stride = BOTTLENECK, 2 if num_halvings else 1
    groups = width if depthwise else 1
    layers = _conv_norm(in_chs, width, 1, **dd) + [nn.ReLU(inplace=True)]
    for _ in range(max(num_halvings, 1)):
        layers += _conv_norm(width, width, 3, stride=stride, groups=groups, **dd) + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *_conv_norm(width, out_chs, 1, **dd))


ALIGNERS = dict(
    conv=conv_aligner, bottleneck=bottleneck_aligner, separable=partial(bottleneck_aligner, depthwise=True))


def to_map(x: Tensor, level: Dict[str, Any], size: Sequence[int]) -> Tensor:
    """Features of a level as a map [B, C, h, w] without class and register tokens. `size` is the images' [H, W]."""
    if level['output_fmt'] == 'NHWC':
        return x.permute(0, 3, 1, 2)
    if level['output_fmt'] == 'NLC':
        if not level['has_map']:
            raise ValueError(f"The tokens of '{level['module']}' are no map of the image: leave this level out.")
        grid = [-(-side // level['reduction']) for side in size]
        return x[:, level['num_prefix_tokens']:].transpose(1, 2).unflatten(2, grid)
    return x


class LevelPool(nn.Module):
    """Pools the features of a level, in any format, to vectors [B, width].

    A vector is the mean over image positions. The first class or register token, if any, is concatenated before it.
    """

    def __init__(self, level: Dict[str, Any]):
        super().__init__()
        self.num_prefix_tokens = level['num_prefix_tokens']
        self.places = {'NCHW': (2, 3), 'NHWC': (1, 2), 'NLC': (1,)}[level['output_fmt']]
        self.width = level['num_chs'] * (2 if self.num_prefix_tokens else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.num_prefix_tokens:
            return torch.cat([x[:, 0], x[:, self.num_prefix_tokens:].mean(1)], dim=-1)
        return x.mean(self.places)


class LevelExpert(nn.Module):
    """An expert without private stages, which concatenates and standardises pooled features of several shared stages.

    A BatchNorm without weights standardises the features. Zeros pad them to `width`, the D of the widest expert.
    `levels` are the numbers of the shared stages that the expert reads, from 1. `infos` describes all shared stages.
    """

    def __init__(self, levels: Sequence[int], infos: Sequence[Dict[str, Any]], width: int, **dd: Any):
        super().__init__()
        self.levels = tuple(levels)
        pools = [LevelPool(infos[level - 1]) for level in levels]
        self.pools, own_width = nn.ModuleList(pools), sum(pool.width for pool in pools)
        self.norm = nn.BatchNorm1d(own_width, affine=False, **dd)
        self.padding = width - own_width

    def forward(self, x: Tensor, shared: Dict[int, Tensor]) -> Tensor:
        """Features [B, D, 1, 1] from `shared`, the features of shared stages by number. `x` is not used."""
        vectors = []
        for i, pool in enumerate(self.pools):
            vectors.append(pool(shared[self.levels[i]]))
        return self.join(vectors)

    def join(self, vectors: List[Tensor]) -> Tensor:
        """Features [B, D, 1, 1] from `vectors`, pooled features of the expert's levels."""
        x = self.norm(torch.cat(vectors, dim=1))
        return F.pad(x, (0, self.padding))[:, :, None, None]


class VectorAligner(nn.Module):
    """Aligner from features of any format to one vector, which is fused with an expert's own features at all positions.

    The last linear layer starts at zero.
    """

    def __init__(self, shallow: Dict[str, Any], own: Dict[str, Any], **dd: Any):
        super().__init__()
        self.pool = LevelPool(shallow)
        self.shape = {'NCHW': (-1, 1, 1), 'NHWC': (1, 1, -1), 'NLC': (1, -1)}[own['output_fmt']]
        self.norm = nn.LayerNorm(self.pool.width, **dd)
        self.down = nn.Linear(self.pool.width, BOTTLENECK, **dd)
        self.act = nn.GELU()
        self.up = nn.Linear(BOTTLENECK, own['num_chs'], **dd)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [B, 1, D], [B, 1, 1, D] or [B, D, 1, 1], to broadcast over tokens, NHWC maps or NCHW maps."""
        return self.up(self.act(self.down(self.norm(self.pool(x))))).unflatten(1, self.shape)


def init_convolutions(module: nn.Module) -> None:
    """Initialise all convolutions and BatchNorms of a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def choose_depths(net: Backbone, num_experts: int, depths: Optional[Sequence[Any]]) -> Tuple[Any, ...]:
    """Choose the shared stage that each expert fuses or, without private stages, the tuple of stages that it reads.

    `Shike` describes the default. Without private stages, the number n stands for stage n and the last stage.
    """
    num_shared, private = len(net.stages), bool(net.last_stages)
    if depths is None and not private:
        late = [max(num_shared - m, 1) for m in range(num_experts, 0, -1)]
        depths = late if num_experts > 1 else [range(max(num_shared - 3, 1), num_shared + 1)]
    elif depths is None and is_column(net.feature_info):
        first = max(num_shared - max(num_shared // 3, num_experts) + 1, 1)
        step = (num_shared - first) / max(num_experts - 1, 1)
        depths = [round(num_shared - step * m) for m in range(num_experts)][::-1]
    elif depths is None:
        depths = [m % num_shared + 1 for m in range(num_experts)]
    if not private:
        depths = [(depth, num_shared) if isinstance(depth, int) else tuple(depth) for depth in depths]
    nested = private and any(isinstance(depth, (list, tuple)) for depth in depths)
    if nested or len(depths) != num_experts or not all(depths) or not all(
            1 <= depth <= num_shared for depth in list_stages(depths)):
        raise ValueError(
            f"depths must name {'one shared stage' if private else 'one or several shared stages'} for each of "
            f'{num_experts} experts, numbers between 1 and {num_shared}, the stages of the trunk, got {tuple(depths)}.')
    return tuple(depths)


def list_stages(depths: Sequence[Any]) -> List[int]:
    """All shared stages in `depths`, as a flat list."""
    return [stage for depth in depths for stage in (depth if isinstance(depth, tuple) else (depth,))]


def joined_level(infos: Sequence[Dict[str, Any]], depths: Sequence[Sequence[int]]) -> Dict[str, Any]:
    """The entry of `Backbone.feature_info` for experts without private stages."""
    width = max(sum(LevelPool(infos[level - 1]).width for level in levels) for levels in depths)
    return dict(num_chs=width, reduction=infos[-1]['reduction'], output_fmt='NCHW', num_prefix_tokens=0, has_map=False)


class Expert(nn.Module):
    """An expert: its private stages, the aligner for the shared stage that it fuses (Eq. 3), and its head.

    The head turns fused features into vectors, as timm's head does before its classifier. None is plain pooling.
    """

    def __init__(
            self, stage: nn.Module, depth: int, aligner: Optional[nn.Module], residual: bool, head: Optional[nn.Module],
            shared_fmt: str, output_fmt: str,
    ):
        super().__init__()
        self.stage = stage
        self.depth = depth
        self.aligner = aligner
        self.residual = residual
        self.head = nn.Identity() if head is None else head
        self.has_maps = not isinstance(aligner, VectorAligner)
        self.from_nhwc = self.has_maps and shared_fmt == 'NHWC'
        self.to_nhwc = self.has_maps and output_fmt == 'NHWC'

    def forward(self, x: Tensor, shared: Dict[int, Tensor]) -> Tensor:
        """Fused features from the output `x` of the last shared stage and the features `shared` of stages by number."""
        x = self.stage(x)
        if self.aligner is not None:
            aligned = shared[self.depth]
            if self.from_nhwc:
                aligned = aligned.permute(0, 3, 1, 2)
            aligned = self.aligner(aligned)
            if self.to_nhwc:
                aligned = aligned.permute(0, 2, 3, 1)
            if self.has_maps:
                # Aligners round odd sizes up. Some backbones round them down: drop the last row and column for those.
                aligned = aligned[:, :x.shape[1], :x.shape[2], :x.shape[3]]
            x = torch.addcmul(x, x, aligned) if self.residual else x * aligned
        return x


def make_experts(
        net: Backbone, make_aligner: Callable[..., nn.Sequential], fusion: str, depths: Sequence[Any], **dd: Any,
) -> nn.ModuleList:
    """Make the experts of a network and initialise their aligners, and the network unless it is `initialised`."""
    *levels, last = net.feature_info
    levels = levels[len(levels) - len(net.stages):]
    if not net.last_stages:
        return nn.ModuleList(LevelExpert(one, levels, last['num_chs'], **dd) for one in depths)
    residual, experts = fusion == 'residual', nn.ModuleList()
    for m, (stage, depth) in enumerate(zip(net.last_stages, depths)):
        align, shallow = None, levels[depth - 1]
        if fusion != 'none' and 'NLC' in (shallow['output_fmt'], last['output_fmt']):
            align = VectorAligner(shallow, last, **dd)
        elif fusion != 'none':
            num_halvings = round(math.log2(last['reduction'] / shallow['reduction']))
            align = make_aligner(shallow['num_chs'], last['num_chs'], num_halvings, **dd)
            if residual and isinstance(align[-1], nn.ReLU):
                del align[-1]  # Residual fusion starts at zero, where a ReLU lets no gradient through.
            if net.initialised:
                init_convolutions(align)
        head = net.heads[m] if net.heads else None
        experts.append(Expert(stage, depth, align, residual, head, shallow['output_fmt'], last['output_fmt']))
    for part in () if net.initialised else (net.stem, *net.stages, experts):
        init_convolutions(part)
    for expert in experts if residual else ():
        if expert.has_maps:
            nn.init.zeros_(expert.aligner[-1].weight)  # This layer is a BatchNorm.
    return experts
