"""A process of tests/test_distributed.py, to be started by torchrun: trains, evaluates, and writes what it saw."""
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch.distributed.nn.functional import all_reduce

from shike_timm.cli.train import parse_train_args
from shike_timm.data import (
    AugmentationConfig,
    LoaderConfig,
    SourceConfig,
    create_eval_loader,
    create_train_loader,
    in_memory_set,
    load_training_data,
)
from shike_timm.distributed import join_processes, rank, world_size
from shike_timm.metrics import evaluate
from shike_timm.models.create import create_model
from shike_timm.training import runs, trainer

CPU = torch.device('cpu')


def synchronised(self, x):
    """BatchNorm over all processes, which have as many images each; torch's own and DDP with it refuse a CPU."""
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)
    num = world_size() * x.numel() / x.shape[1]
    mean = all_reduce(x.sum((0, 2, 3))) / num
    centred = x - mean[:, None, None]
    var = all_reduce(centred.square().sum((0, 2, 3))) / num
    with torch.no_grad():
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * num / (num - 1), self.momentum)
        self.num_batches_tracked += 1
    scale = self.weight * (var + self.eps).rsqrt()
    return centred * scale[:, None, None] + self.bias[:, None, None]


def main(out, *argv):
    # One ReLU that rounding turns moves a gradient of this small network by percents, with any split of a batch.
    torch.nn.ReLU.forward = lambda self, x: F.silu(x)
    losses, original = [], trainer.train_step

    def train_step(*args):
        result = original(*args)
        loss = result['loss'].detach() / world_size()
        if world_size() > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
        return result

    trainer.train_step = train_step
    args = parse_train_args(argv)
    join_processes('cpu')
    if world_size() > 1:
        torch.nn.BatchNorm2d.forward = synchronised
    seen = dict(losses=losses, metrics=runs.train(args))

    data = load_training_data(SourceConfig(dataset='digits_lt'))
    config = resolve_data_config(dict(input_size=(3, 8, 8), crop_pct=1., mean=(0.5,) * 3, std=(0.3,) * 3))
    few = in_memory_set(data.test.images[:101], data.test.targets[:101], data.class_names)
    torch.manual_seed(0)
    model = create_model(args, 10)
    seen['evaluations'] = [
        evaluate(model, create_eval_loader(few, config, 32, CPU, 0, on_device), data.class_counts, CPU)
        for on_device in (True, False)
    ]
    # Which images came, told by their pixels: the labels of a data set whose images all differ.
    numbered = in_memory_set(data.train.images, range(len(data.train.images)), range(len(data.train.images)))
    seen['images'] = []
    for on_device in (True, False):
        loader = create_train_loader(
            numbered, config, LoaderConfig(batch_size=8, device_data=on_device),
            AugmentationConfig(train_crop_mode='pad', color_jitter=0.), CPU, 0)
        loader.sampler.set_epoch(5, 0, len(loader))
        batches = [(target.tolist(), images.double().sum((1, 2, 3)).tolist()) for images, target in loader]
        everybody = [None] * world_size()
        if world_size() > 1:
            dist.all_gather_object(everybody, batches)
        seen['images'].append(everybody if world_size() > 1 else [batches])
    if rank() == 0:
        with open(out, 'w') as file:
            json.dump(seen, file)
    if world_size() > 1:
        dist.destroy_process_group()


main(*sys.argv[1:])
