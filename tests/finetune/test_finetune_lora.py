"""The lean LoRA layer is mlx-lm's in every value and gradient."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers import largest_difference
from mlx_lm.tuner.lora import LoRALinear

from rodimus_mlx.finetune.lora import LeanLoRALinear, make_lean


def adapted(bits=None, dropout=0.0):
    mx.random.seed(0)
    base = nn.Linear(64, 96, bias=False)
    layer = LoRALinear.from_base(base.to_quantized(32, bits) if bits else base, 4, dropout, 20.0)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    layer.freeze()
    layer.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
    return nn.Sequential(layer)


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "4 bit"])
def test_lean_is_stock(bits):
    stock = adapted(bits).train()
    lean = copy.deepcopy(stock)
    make_lean(lean)
    assert type(lean.layers[0]) is LeanLoRALinear
    x, weights = mx.random.normal((2, 7, 64)), mx.random.normal((2, 7, 96))

    def value_and_gradients(model):
        def loss(parameters, x):
            model.update(parameters)
            return (model(x) * weights).sum()

        value, (of_parameters, of_x) = mx.value_and_grad(loss, argnums=(0, 1))(model.trainable_parameters(), x)
        return value, of_parameters["layers"][0]["lora_a"], of_parameters["layers"][0]["lora_b"], of_x

    for found, expected in zip(value_and_gradients(lean), value_and_gradients(stock)):
        assert largest_difference(found, expected) < 1e-5 * float(mx.abs(expected).max())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("base", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16], ids=str)
def test_types_are_those_of_the_stock_layer(training, base, own):
    stock = adapted().train(training)
    stock.set_dtype(own)
    stock.layers[0].linear.set_dtype(base)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    x = mx.ones((1, 64), base)
    assert lean(x).dtype == stock(x).dtype == base


def test_dropout_is_kept():
    model = adapted(dropout=0.5).train()
    make_lean(model)
    x = mx.ones((1, 64))
    assert largest_difference(model(x), model(x)) > 0
