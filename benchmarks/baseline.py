#!/usr/bin/env python3
"""The baseline of all comparisons: SHIKE in a plain PyTorch loop on CIFAR-100-LT, like that of its authors.

float32, contiguous layout, nothing compiled; Pillow transforms in DataLoader workers; the losses pair by pair and
expert by expert; the loss read on the host each step; an evaluation after each epoch. The model is the registered one.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shike_timm  # noqa: E402, F401
from shike_timm.data import SourceConfig, load_training_data  # noqa: E402
from shike_timm.models.registry import CIFAR_MEAN, CIFAR_STD  # noqa: E402


class NumpyCutout:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        height, width = image.shape[1:]
        y, x = np.random.randint(height), np.random.randint(width)
        top, bottom = np.clip([y - self.size // 2, y + self.size // 2], 0, height)
        left, right = np.clip([x - self.size // 2, x + self.size // 2], 0, width)
        mask = torch.ones(height, width)
        mask[top:bottom, left:right] = 0.
        return image * mask


def mutual_distillation(logits):
    loss = 0.
    for j in range(len(logits)):
        for k in range(len(logits)):
            if j != k:
                loss = loss + F.kl_div(
                    F.log_softmax(logits[k], dim=1), F.softmax(logits[j], dim=1), reduction='batchmean')
    return loss


def knowledge_transfer(logits, target):
    num_classes = logits[0].shape[1]
    others = torch.ones_like(logits[0]).scatter_(1, target[:, None], 0).bool()
    logits = [one[others].view(-1, num_classes - 1) for one in logits]
    mean = sum(logits) / len(logits)
    hardest = F.one_hot(mean.argmax(1), num_classes - 1).bool()
    teacher = torch.where(hardest, mean, torch.stack(logits).max(0).values)
    loss = 0.
    for one in logits:
        loss = loss + F.kl_div(F.log_softmax(one, dim=1), F.softmax(teacher, dim=1), reduction='batchmean')
    return loss


def stage_one_loss(logits, target):
    cross_entropy = sum(F.cross_entropy(one, target) for one in logits)
    return cross_entropy + 0.1 * knowledge_transfer(logits, target) + 0.01 * mutual_distillation(logits)


def stage_two_loss(logits, target, class_counts):
    return sum(F.cross_entropy(one + class_counts.log(), target) for one in logits)


def evaluate(model, loader, device):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            correct += (model(images).argmax(1) == target).sum().item()
            total += len(target)
    model.train()
    return 100 * correct / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='folder of CIFAR-100')
    parser.add_argument('--stage', type=int, default=1, choices=[1, 2])
    parser.add_argument('--num-warm-iter', type=int, default=10, help='steps before timing')
    parser.add_argument('--num-bench-iter', type=int, default=40, help='timed steps')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--workers', type=int, default=2, help='DataLoader workers')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--results-file', help='JSON file to write the figures to')
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    device = torch.device(args.device)

    normalize = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
    data = load_training_data(SourceConfig(dataset='cifar100_lt', data_dir=args.data_dir))
    train_set, test_set = data.train, data.test
    train_set.transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=[128] * 3),
        transforms.ToTensor(),
        NumpyCutout(16),
        transforms.Normalize(CIFAR_MEAN, CIFAR_STD),
    ])
    test_set.transform = transforms.Compose(normalize)
    options = dict(num_workers=args.workers, pin_memory=device.type == 'cuda')
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True, **options)
    test_loader = DataLoader(test_set, args.batch_size, **options)
    class_counts = torch.tensor(data.class_counts, dtype=torch.float32, device=device)

    model = timm.create_model('resnet32_shike', num_classes=100).to(device).train()
    if args.stage == 2:
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.reset_classifier(100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=5e-4)

    step, losses = 0, []
    last = args.num_warm_iter + args.num_bench_iter
    while step < last:
        for images, target in train_loader:
            if step == args.num_warm_iter:
                start = time.perf_counter()
            images, target = images.to(device), target.to(device)
            logits = list(model.forward_experts(images).unbind(1))
            if args.stage == 1:
                loss = stage_one_loss(logits, target)
            else:
                loss = stage_two_loss(logits, target, class_counts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            if step == last:
                break
    train_seconds = time.perf_counter() - start
    start = time.perf_counter()
    accuracy = evaluate(model, test_loader, device)
    eval_seconds = time.perf_counter() - start

    rate = args.num_bench_iter * args.batch_size / train_seconds
    epoch_seconds = len(train_loader) * args.batch_size / rate + eval_seconds
    result = dict(
        stage=args.stage,
        images_per_second=round(rate, 2),
        eval_seconds=round(eval_seconds, 2),
        epoch_seconds=round(epoch_seconds, 2),
        epoch_images=len(train_loader) * args.batch_size,
        last_loss=round(losses[-1], 4),
        top1=accuracy,
    )
    print(result)
    if args.results_file:
        Path(args.results_file).write_text(json.dumps(result))


if __name__ == '__main__':
    main()
