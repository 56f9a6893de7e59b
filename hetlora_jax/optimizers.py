"""The optimizers of clients and servers, by name."""

import functools

import optax

# name -> (learning rate, weight decay) -> GradientTransformation.
CLIENT = {
  'adam': lambda rate, decay: optax.adam(rate),
  'adamw': lambda rate, decay: optax.adamw(rate, weight_decay=decay),
  'sgd': lambda rate, decay: optax.sgd(rate),
}
# name -> (learning rate) -> GradientTransformation, of the pseudo-gradient
# (Reddi et al., 2020, arXiv 2003.00295).
SERVER = {
  'sgd': optax.sgd,
  'momentum': functools.partial(optax.sgd, momentum=0.9),
  'adam': functools.partial(optax.adam, b2=0.99, eps=1e-3),
  'yogi': functools.partial(optax.yogi, b2=0.99),
}
