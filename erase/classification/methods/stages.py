"""Which parameters of a classifier belong to its last stages, and which to normalisation layers."""

import re

from torch import nn

STAGE = re.compile(r"(?:^|\.)(?:layers?|stages?)\.?(\d+)\.")  # layer3.0.conv1, encoder.stages.2.layers.0
NORMALISATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def last_stages(model: nn.Module) -> set[str]:
    """Names of the parameters of the last two stages, and of all that follow, such as the last linear layer.

    Stages are numbered in the names of parameters, as layer3 and layer4 in a ResNet. A network with fewer than three
    numbered stages counts as stages of one layer each, of which the last half is taken, the middle one included.
    """
    names = [name for name, _ in model.named_parameters()]
    numbers = {name: int(match[1]) for name in names if (match := STAGE.search(name))}
    order = sorted(set(numbers.values()))
    if len(order) >= 3:
        first = next(name for name in names if numbers.get(name) == order[-2])
    else:
        layers = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
        first = layers[len(layers) // 2] if layers else names[0]
    return set(names[names.index(first) :])


def normalisation(model: nn.Module) -> set[str]:
    """Names of the weights and biases of normalisation layers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, NORMALISATION)
        for name, _ in module.named_parameters(recurse=False)
    }
