"""The update rules of `pyops/ops/optim_rules.py` on a tile in fp32: (p, g, states, coefficients) → (p, states).

Each is the equation of the reference with its roundings: a product and a sum are rounded apart (kernels are compiled
without contraction into multiply-adds), except in `addcmul`, which torch's own kernels contract on CPUs and GPUs alike.
Division and square root are rounded to nearest.
"""

import triton
import triton.language as tl


@triton.jit
def _lerp(state, x, weight):
    return state + (x - state) * weight


@triton.jit
def _addcmul(state, g, weight):
    return tl.fma(weight * g, g, state)


@triton.jit
def _largest(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sgd(p, g, states, c):
    return p - c[0] * g, ()


@triton.jit
def sgd_momentum(p, g, states, c):
    b = states[0] * c[1] + g * c[2]
    return p - c[0] * (c[3] * g + c[4] * b), (b,)


@triton.jit
def adam(p, g, states, c):
    m = _lerp(states[0], g, c[0])
    v = _addcmul(states[1] * c[1], g, c[2])
    return p - tl.div_rn(c[3] * m, tl.sqrt_rn(v) * c[4] + c[5]), (m, v)


@triton.jit
def adam_amsgrad(p, g, states, c):
    m = _lerp(states[0], g, c[0])
    v = _addcmul(states[1] * c[1], g, c[2])
    largest = _largest(states[2], v)
    return p - tl.div_rn(c[3] * m, tl.sqrt_rn(largest) * c[4] + c[5]), (m, v, largest)


@triton.jit
def nadam(p, g, states, c):
    m = _lerp(states[0], g, c[0])
    v = _addcmul(states[1] * c[1], g, c[2])
    return p - tl.div_rn(c[3] * g + c[4] * m, tl.sqrt_rn(v * c[5]) + c[6]), (m, v)


@triton.jit
def radam(p, g, states, c):
    m = _lerp(states[0], g, c[0])
    v = _addcmul(states[1] * c[1], g, c[2])
    step = c[3] * m
    return p - tl.where(c[5] != 0, tl.div_rn(step, tl.sqrt_rn(v) + c[4]), step), (m, v)


@triton.jit
def adamax(p, g, states, c):
    m = _lerp(states[0], g, c[0])
    u = _largest(states[1] * c[1], tl.abs(g) + c[3])
    return p - tl.div_rn(c[2] * m, u), (m, u)


@triton.jit
def rmsprop(p, g, states, c):
    v = _addcmul(states[0] * c[0], g, c[1])
    return p - tl.div_rn(c[2] * g, tl.sqrt_rn(v) + c[3]), (v,)


@triton.jit
def rmsprop_momentum(p, g, states, c):
    v = _addcmul(states[0] * c[0], g, c[1])
    b = states[1] * c[4] + tl.div_rn(g, tl.sqrt_rn(v) + c[3])
    return p - c[2] * b, (v, b)


@triton.jit
def _centered_root(v, a):
    return tl.sqrt_rn(_largest(v - a * a, 0.0))


@triton.jit
def rmsprop_centered(p, g, states, c):
    v = _addcmul(states[0] * c[0], g, c[1])
    a = _lerp(states[1], g, c[1])
    return p - tl.div_rn(c[2] * g, _centered_root(v, a) + c[3]), (v, a)


@triton.jit
def rmsprop_centered_momentum(p, g, states, c):
    v = _addcmul(states[0] * c[0], g, c[1])
    a = _lerp(states[1], g, c[1])
    b = states[2] * c[4] + tl.div_rn(g, _centered_root(v, a) + c[3])
    return p - c[2] * b, (v, a, b)


@triton.jit
def adagrad(p, g, states, c):
    v = _addcmul(states[0], g, 1.0)
    return p - tl.div_rn(c[0] * g, tl.sqrt_rn(v) + c[1]), (v,)


@triton.jit
def adadelta(p, g, states, c):
    v = _addcmul(states[0] * c[0], g, c[1])
    delta = tl.div_rn(tl.sqrt_rn(states[1] + c[3]), tl.sqrt_rn(v + c[3])) * g
    u = _addcmul(states[1] * c[0], delta, c[1])
    return p - c[2] * delta, (v, u)


@triton.jit
def lion(p, g, states, c):
    x = c[1] * states[0] + c[2] * g
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))  # NaN stays
    return p - c[0] * sign, (states[0] * c[3] + g * c[4],)


@triton.jit
def lamb(p, g, states, c):
    """The direction u in place of the new p, which needs ‖p‖ and ‖u‖ of the whole tensor: p - lr·‖p‖/‖u‖·u."""
    m = _lerp(states[0], g, c[0])
    v = _addcmul(states[1] * c[1], g, c[2])
    return tl.div_rn(m * c[3], tl.sqrt_rn(v) * c[4] + c[5]) + c[7] * p, (m, v)


UPDATES = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "adam": adam,
    "adam_amsgrad": adam_amsgrad,
    "nadam": nadam,
    "radam": radam,
    "adamax": adamax,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop_momentum,
    "rmsprop_centered": rmsprop_centered,
    "rmsprop_centered_momentum": rmsprop_centered_momentum,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "lion": lion,
    "lamb": lamb,
}
"""The update of every rule of `optim_step`."""
