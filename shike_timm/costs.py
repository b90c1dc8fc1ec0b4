"""What a model costs: parameters, floating-point operations and seconds."""
import statistics
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. Other devices do not wait."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], Any], device: torch.device, num_calls: int) -> float:
    """Average seconds of a call, including the work that the device does after the call returns."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def rates_by_turns(steps: Dict[Callable[[], Any], int], device: torch.device, num_rounds: int) -> List[List[float]]:
    """Measure the calls a second of each step in each round. `steps` maps each function to its calls in a turn.

    The steps take turns, so a machine that slows down affects all of them alike.
    """
    rounds = [
        [1 / seconds_per_call(step, device, number) for step, number in steps.items()] for _ in range(num_rounds)]
    return [list(rates) for rates in zip(*rounds)]


@torch.inference_mode()
def inference_costs(
        models: Dict[Any, nn.Module], images: Tensor, num_rounds: int = 5, seconds_per_turn: float = 0.5,
) -> Dict[Any, Dict[str, float]]:
    """Costs of models in eval mode on a batch [B, C, H, W]: `parameters`, `gmacs` of an image, `images_per_second`."""
    steps = [partial(model, images) for model in models.values()]
    # Counting also makes the first call of each step, which is slow and must not be timed.
    flops = [count_flops(step) for step in steps]
    turns = {step: max(round(seconds_per_turn / seconds_per_call(step, images.device, 1)), 1) for step in steps}
    rates = rates_by_turns(turns, images.device, num_rounds)
    return {
        name: dict(
            parameters=sum(p.numel() for p in model.parameters()), gmacs=flops[i] / 2e9 / len(images),
            images_per_second=len(images) * statistics.median(rates[i]))
        for i, (name, model) in enumerate(models.items())
    }


def count_flops(step: Callable[[], Any], formulas: Optional[Dict[Any, Any]] = None) -> int:
    """Floating-point operations of the convolutions and matrix products of a step. A multiply-add counts as two.

    `formulas` map operations of `torch.ops` to functions that count them in place of torch's own.
    """
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()
