# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A round, opened up
#
# The library runs a round as one compiled function, `hetlora_jax.federated_round`. Here
# its steps are called one by one, for HetLoRA, and each shows what it does to the
# arrays. At the end, all of it together is compared with the compiled round.
#
# Letters at the end of names are axes: C clients, L layers, D and F the two sides of a
# matrix, R rank slots.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import hetlora_jax as hl
from configs import tiny
from hetlora_jax import client, experiment, lora, prng, ranks, server
from hetlora_jax.methods import tail
from hetlora_jax.types import ClientUpdates, Trained

# %% [markdown]
# ## What a round needs
#
# Six clients of a tiny random model; adapters of two matrices have 12 slots each. The
# penalty on tails is strong, so that something is pruned.

# %%
c = tiny.get_config()
c.update_from_flattened_dict({
  'federated.clients_per_round': 6,
  'federated.clients_at_once': None,
  'federated.r_max': 12,
  'federated.gamma': 0.75,
  'federated.tail_penalty': 8.0,
  'ranks.distribution': 'uniform',
  'lora.targets': ('q', 'down'),
  'model.random.width': 24,
  'model.random.num_layers': 1,
  'model.random.mlp_width': 32,
})  # fmt: skip
c = hl.resolve(c)
x = experiment.prepare(c)
rank_N, state, hyper = experiment.start(x, c)
base, rules = x.model.params, x.rules

# %% [markdown]
# The state is all that the server knows: adapters, and of every client its rank. What is
# random comes from the seed, the round and the client, so no key is in it.

# %%
jax.tree.map(lambda leaf: leaf.shape, state.adapters), state.memory.rank.shape

# %% [markdown]
# In the first round B is zero, and there is nothing to see. So let four rounds pass, by
# the compiled function, and open the fifth.

# %%
run_round = jax.jit(functools.partial(hl.federated_round, rules))
for number in range(4):
  cohort = experiment.make_cohort(x, c.seed, number, slice(None))
  state, metrics = run_round(base, state, cohort, hyper)
cohort = experiment.make_cohort(x, c.seed, 4, slice(None))
rank_C = state.memory.rank[cohort.client_id, 0]
print('clients', cohort.client_id, 'of ranks', rank_C)


# %% [markdown]
# ## 1. Distribute, by truncation
#
# A client of rank r receives the first r slots of both factors; the others are zero. All
# clients have arrays of one shape, so one program serves every rank.

# %%
send = jax.jit(jax.vmap(lambda i: client.sent_to(rules, state, hyper, i)))
view_C = send(cohort.client_id)


def slots(adapters):
  """Returns how much each slot does, ||a_j|| ||b_j||, summed over matrices."""
  return sum(
    (np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)).sum(-2)
    for a, b in jax.device_get(adapters).values()
  )


def draw(**pictures):
  """Draws slots [C, R] of every client as heat maps side by side."""
  figure, axes = plt.subplots(
    1, len(pictures), figsize=(4.2 * len(pictures), 3), layout='constrained',
    squeeze=False,
  )  # fmt: skip
  top = max(float(slot_CR.max()) for slot_CR in pictures.values())
  for axis, (title, slot_CR) in zip(axes[0], pictures.items(), strict=True):
    shown = np.where(slot_CR > 0, slot_CR, np.nan)  # what is zero stays white
    image = axis.imshow(
      shown, vmin=0, vmax=top, extent=(0.5, 12.5, 5.5, -0.5), aspect='auto'
    )
    axis.set(title=title.replace('_', ' '), xlabel='rank slot', xticks=range(1, 13))
    axis.set_yticks(range(6), [f'client {i}' for i in cohort.client_id])
  figure.colorbar(image, ax=axes, label='$||a_j|| \\, ||b_j||$')
  plt.show()


draw(received=slots(view_C.adapters))

# %% [markdown]
# ## 2. Train, each client for itself
#
# A few steps of Adam on the client's own batches. Slots that are not its own have no
# gradient, so they stay zero. The objective adds λ ||A_tail|| ||B_tail||, where the tail
# is slots [γ r, r): what the data do not need there shrinks.


# %%
@jax.jit
@jax.vmap
def train(client_id, view, rank_G, batches):
  key = prng.stream(hyper.seed, 'client', state.round, client_id)
  received = Trained(view.adapters, {})  # {}: the base is frozen
  trained, loss, tokens = client.local_update(
    rules, base, received, view, rank_G, batches, state.round, hyper, key
  )
  return trained.adapters, loss / tokens


memory_C = client.recall(state, cohort.client_id)
trained_C, loss_C = train(cohort.client_id, view_C, memory_C.rank, cohort.batches)
draw(received=slots(view_C.adapters), trained=slots(trained_C))

# %% [markdown]
# ## 3. Prune the own rank
#
# A client whose tail became smaller than the one that it received gives the tail up.


# %%
@jax.jit
@jax.vmap
def tail_size(adapters, rank_G):
  return ranks.gather(rules.tail_norms(adapters, rank_G, hyper.gamma), 1)


before_C = tail_size(view_C.adapters, memory_C.rank)[:, 0]
after_C = tail_size(trained_C, memory_C.rank)[:, 0]
kept_C = tail.kept_rank(memory_C.rank, hyper.gamma)[:, 0]
pruned_C = jnp.where(after_C < before_C, jnp.maximum(kept_C, hyper.r_min), rank_C)

pd.DataFrame({
  'client': cohort.client_id,
  'rank': rank_C,
  'tail received': before_C,
  'tail trained': after_C,
  'rank kept': pruned_C,
}).round(3)  # fmt: skip

# %%
masks = jax.vmap(lambda rank_G: ranks.masks(rank_G, state.adapters))(pruned_C[:, None])
sent_C = lora.truncate(trained_C, masks)
draw(received=slots(view_C.adapters), trained=slots(trained_C), sent_back=slots(sent_C))

# %% [markdown]
# ## 4. Weigh by what was learnt
#
# HetLoRA's weights are in proportion to the norm of each client's product, ||s A B||,
# over all matrices; FedAvg's are the clients' numbers of examples.

# %%
norm_C = jax.vmap(lora.delta_norms)(sent_C, view_C.scale)
weights = rules.weigh(cohort.num_examples, masks, norm_C)
weight_C = weights['q'][:, 0, 0]  # the same for every matrix and slot
size_C = cohort.num_examples / cohort.num_examples.sum()

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout='constrained')
whole_C = np.sqrt(sum((np.asarray(x) ** 2).sum(1) for x in norm_C.values()))
names = [f'{i}\nrank {r}' for i, r in zip(cohort.client_id, pruned_C, strict=True)]
left.bar(names, whole_C)
left.set(title='Norm of what a client sends', ylabel='||s A B||')
at = np.arange(6)
right.bar(at - 0.2, weight_C, 0.4, label='HetLoRA: norm')
right.bar(at + 0.2, size_C, 0.4, label='FedAvg: examples')
right.set(title='Weight of the client')
right.set_xticks(at, names)
right.legend()
plt.show()

# %% [markdown]
# ## 5. Average the zero-padded factors
#
# A is the weighted mean of the clients' A, and B that of their B; zeros count where a
# client has no slot. The server's optimizer then steps to the mean (plain SGD at 1.0),
# and a slot that nobody trained keeps the server's value.

# %%
updates = ClientUpdates(
  adapters=sent_C, mask=masks, scale=view_C.scale,
  num_examples=cohort.num_examples, norm=norm_C,
)  # fmt: skip
now = client.global_adapters(rules, state, hyper)
mean = rules.aggregate(updates, weights, now)
stepped, _ = server.step(
  rules, state, now, hyper, mean, {}, updates.owned(), jnp.bool_(True)
)
new = stepped.adapters

figure, axes = plt.subplots(2, 4, figsize=(12, 4.6), layout='constrained')
low, high = int(np.argmin(pruned_C)), int(np.argmax(pruned_C))
for row, factor in zip(axes, 'AB', strict=True):
  shown = {
    "server's": getattr(state.adapters['q'], factor.lower())[0],
    f"client {cohort.client_id[low]}'s": getattr(sent_C['q'], factor.lower())[low, 0],
    f"client {cohort.client_id[high]}'s": getattr(sent_C['q'], factor.lower())[high, 0],
    "new server's": getattr(new['q'], factor.lower())[0],
  }
  top = max(np.abs(value).max() for value in shown.values())
  for axis, (title, value) in zip(row, shown.items(), strict=True):
    value = value.T if factor == 'A' else value  # slots are rows
    image = axis.imshow(value, cmap='RdBu', vmin=-top, vmax=top, aspect='auto')
    axis.set(title=f'{title} {factor}', ylabel='rank slot')
    axis.set_yticks(range(0, 12, 2), range(1, 13, 2))
  figure.colorbar(image, ax=row)
figure.suptitle("Both factors of the first layer's query matrix")
plt.show()

# %% [markdown]
# Slots that few clients own are drawn towards zero, since the others count with zeros
# there. It is what the paper does; rules that weigh a slot among its owners alone
# (`methods.weighting=owner_size`) do not.

# %%
figure, axis = plt.subplots(figsize=(6, 2.8), layout='constrained')
at = np.arange(1, 13)
axis.bar(at - 0.2, slots(state.adapters), 0.4, label='before')
axis.bar(at + 0.2, slots(new), 0.4, label='after')
axis.set(title="The server's slots", ylabel='$||a_j|| \\, ||b_j||$')
owners = (at <= np.asarray(pruned_C)[:, None]).sum(0)
axis.set_xticks(at, [f'{j}\n{n}' for j, n in zip(at, owners, strict=True)])
axis.set_xlabel('rank slot, and how many clients sent it')
axis.legend()
plt.show()

# %% [markdown]
# ## All of it at once
#
# The compiled function does the same, in one program, for all methods.

# %%
compiled, metrics = run_round(base, state, cohort, hyper)
np.testing.assert_array_equal(metrics['rank'][:, 0], pruned_C)
for target, factors in new.items():
  for ours, theirs in zip(factors, compiled.adapters[target], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
print('The ranks are equal, and so are the factors but for rounding.')

# %% [markdown]
# Next: the same rules [in the code](../methods/hetlora.md), another
# [method](../methods.md), or [a rule of your own](../howto/own_rule.md).
