"""Numbers drawn inside come again outside."""

import random

import numpy as np
import torch

from qbl_trl.random_state import same_random_state


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_whatever_is_drawn_inside_is_drawn_again_outside():
    with same_random_state():
        inside = draw()
    assert draw() == inside
