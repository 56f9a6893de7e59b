"""Breaks lines of the rules, one at a time; a test must notice each.

python -m tests.mutations [WORD...]     (make mutations)

Each mutation is made in a copy of the code, where only the test that is named beside
it runs; two mutations are tried at a time. First all these tests must pass on the code
as it is. With words, only those mutations are made whose row has them all.
The last line counts those that were noticed; exit code 1 if not all were.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
COPIED = ('hetlora_jax', 'configs', 'launch', 'tests')
AT_ONCE = 2
FAILED = 1  # pytest's exit code if a test ran and failed


class Mutation(NamedTuple):
  """A text of hetlora_jax/{file}.py, what it becomes, and the test that fails."""

  file: str
  text: str
  broken: str
  test: str


_THREE_ROUNDS = 'reference_test.py::test_three_rounds_agree_with_numpy'
_UNEQUAL = 'reference_test.py::test_methods_of_unequal_ranks_agree_under_every_scale'
_IDENTITY = 'methods_test.py::test_product_identity'
_DROPS_OUT = (
  'methods_test.py::test_a_client_that_drops_out_is_as_if_it_had_not_been_there'
)
_ALONE = 'methods_test.py::test_one_client_alone_is_taken_as_it_is[hetlora]'
_UNTRAINED = 'methods_test.py::test_what_nobody_trained_keeps_values_and_moments'
_SMALL_RANKS = (
  'methods_test.py::'
  'test_a_cohort_of_small_ranks_leaves_what_it_does_not_own_of_a_product'
)
_LOW_RANK = (
  'methods_test.py::test_a_mean_of_low_rank_leaves_the_other_slots_to_be_trained'
)
_RANDOM_SLOTS = 'rules_test.py::test_random_slots_are_as_many_as_the_rank_and_differ'
_ALL_SLOTS = 'rules_test.py::test_full_distribution_gives_everybody_every_slot'
_PREFIXES = 'rules_test.py::test_prefixes_are_drawn_evenly_from_r_min_to_the_rank'
_ENERGY = 'rules_test.py::test_energy_pruning_keeps_the_first_slots_that_hold_enough'
_NORM_WEIGHTS = 'rules_test.py::test_norm_weights_by_hand'
_SILENT = (
  'rules_test.py::test_who_has_learnt_nothing_weighs_nothing_beside_those_who_have'
)
_OWNERS = 'rules_test.py::test_owner_weights_by_hand'
_BYTES = 'rules_test.py::test_bytes_follow_the_papers_formulas'
_STACKS = 'rules_test.py::test_stacks_are_sent_as_factors_while_they_are_small'
_NOT_FINITE = 'robust_test.py::test_a_client_that_is_not_finite_counts_as_absent'


def _of_method(method: str) -> str:
  return f'{_THREE_ROUNDS}[{method}]'


def _on_wire(method: str) -> str:
  return f'reference_test.py::test_a_wire_rounds_where_numpy_does[{method}]'


MUTATIONS = tuple(Mutation(*row) for row in [
  # What a client receives.
  ('methods/distribution', 'View(lora.truncate(adapters, masks), masks, scale)',
   'View(adapters, masks, scale)', _of_method('hetlora')),
  ('methods/distribution', 'View(adapters, jax.tree.map(jnp.ones_like, masks), scale)',
   'View(adapters, masks, scale)', _ALL_SLOTS),
  ('methods/distribution', 'place < mask.sum(-1, keepdims=True)',
   'place <= mask.sum(-1, keepdims=True)', _RANDOM_SLOTS),
  ('methods/distribution', 'View(adapters, _choose(masks, key), scale)',
   'View(adapters, masks, scale)', _RANDOM_SLOTS),
  ('methods/distribution', 'lora.truncate(adapters, chosen), chosen',
   'adapters, chosen', _of_method('fslora')),
  ('methods/distribution', 'chosen, scale / slots.mean()', 'chosen, scale',
   _of_method('fslora')),
  ('methods/distribution', 'lora.truncate(fresh, masks), masks', 'fresh, masks',
   _of_method('flora')),
  # What it minimises, and which factors it trains.
  ('methods/objective', 'mean + about.hyper.tail_penalty * penalty', 'mean',
   _of_method('hetlora')),
  ('methods/objective', 'tail.norms(trained.adapters,',
   'tail.norms(about.received.adapters,', _of_method('hetlora')),
  ('methods/objective', 'about.hyper.proximal / 2', 'about.hyper.proximal',
   _of_method('fedprox')),
  ('methods/objective', 'jnp.subtract, trained, about.received)',
   'jnp.subtract, trained, trained)', _of_method('fedprox')),
  ('methods/objective', 'shorter = lora.truncate(trained.adapters, masks)',
   'shorter = trained.adapters', _of_method('prelort')),
  ('methods/objective', 'draw * (rank - low + 1)', 'draw * (rank - low)', _PREFIXES),
  ('methods/trainable', 'return lora.slot_masks(masks)',
   'return lora.slot_masks(jax.tree.map(jnp.ones_like, masks))',
   _of_method('fed_plora')),
  ('methods/trainable', 'Lora(0 * x.a, x.b)', 'Lora(x.a, 0 * x.b)',
   _of_method('ffa_lora')),
  ('methods/trainable', 'Lora(odd * x.a, (1 - odd) * x.b)',
   'Lora((1 - odd) * x.a, odd * x.b)', _of_method('rolora')),
  # Which rank it keeps.
  ('methods/pruning', 'ranks.gather(sizes, rank.shape[0]) < before',
   'ranks.gather(sizes, rank.shape[0]) > before', _of_method('hetlora')),
  ('methods/pruning', 'ranks.gather(sizes, rank.shape[0]) < before',
   'ranks.gather(sizes, rank.shape[0]) <= before',
   'rounds_test.py::test_a_tail_that_stays_as_it_was_is_kept'),
  ('methods/pruning', 'jnp.maximum(kept, floor)', 'kept', _of_method('hetlora')),
  ('methods/pruning', 'lora.energy_rank(slot_GR, hyper.energy)', 'rank', _ENERGY),
  ('methods/pruning', '(x.a**2).sum(-2) * (x.b**2).sum(-1)', '(x.a**2).sum(-2)',
   _ENERGY),
  ('methods/tail', 'jnp.floor(gamma * rank + 1e-4)', 'jnp.floor(gamma * rank)',
   'rounds_test.py::test_kept_rank_is_the_exact_floor'),
  ('methods/tail', 'prefix_mask(rank[t], slots) * (1 - head)',
   'prefix_mask(rank[t], slots)', _of_method('hetlora')),
  # How much it counts.
  ('methods/weighting', '_share((num_examples > 0).astype(jnp.float32))',
   '_share(num_examples.astype(jnp.float32))',
   'rules_test.py::test_uniform_weights_ignore_sizes'),
  ('methods/weighting', '_share(value_C[:, None, None] * m)',
   '_share(value_C[:, None, None] + 0 * m)', _OWNERS),
  ('methods/weighting', 'return _owners(num_examples, masks)',
   'return _owners((num_examples > 0) * 1.0, masks)', _OWNERS),
  ('methods/weighting', 'jnp.sqrt(square[t]) * present', 'square[t] * present',
   _NORM_WEIGHTS),
  ('methods/weighting', 'silent = weight.sum(0, keepdims=True) == 0',
   'silent = weight == 0', _SILENT),
  # How adapters become one.
  ('methods/aggregation', 'weights[t]) + kept[t].a', 'weights[t])', _ALONE),
  ('methods/aggregation', 'weights[t]) + kept[t].b', 'weights[t])', _ALONE),
  ('methods/aggregation', 'x.a * (scale * weights[t])[..., None, :]',
   'x.a * weights[t][..., None, :]', _of_method('flexlora')),
  ('methods/aggregation', 'a, x.b) + kept[t]', 'a, x.b)', _SMALL_RANKS),
  ('methods/aggregation', 'exact - lora.deltas(mean, server.scale)[t]',
   'exact - lora.deltas(mean, 1.0)[t]', _of_method('fedex')),
  ('methods/aggregation', 'old + (w * (new - old[None])).sum(0)', '(w * new).sum(0)',
   _of_method('fslora')),
  ('methods/aggregation',
   'lora.slot_masks(jax.tree.map(jnp.multiply, weights, updates.mask))',
   'lora.slot_masks(weights)', _of_method('fslora')),
  ('methods/aggregation', 'place < (count - cut)[None]', 'place <= (count - cut)[None]',
   'robust_test.py::test_median_and_trimmed_mean_agree_with_numpy'),
  # What the server makes of it.
  ('methods/redistribution', '_svd(delta / scale)', '_svd(delta)',
   _of_method('flexlora')),
  ('methods/redistribution', 'return u * sign, sigma, v * sign.mT',
   'return u, sigma, v', _of_method('flexlora')),
  ('methods/redistribution', 'return u * sign, sigma, v * sign.mT',
   'return u * sign, sigma, v', _of_method('flexlora')),
  ('methods/redistribution', 'sigma ** (1 - power_a)', 'sigma**power_a', _IDENTITY),
  ('methods/redistribution',
   '  a = jnp.where(live[:, None], a, server.a[..., :kept])\n', '', _LOW_RANK),
  ('methods/redistribution', 'jnp.concatenate([a, server.a[..., kept:]], -1)',
   'jnp.pad(a, ((0, 0), (0, 0), (0, rest)))', _of_method('flexlora')),
  ('methods/redistribution', 'lora.energy_rank(sigma**2, share)',
   'lora.energy_rank(sigma, share)', _of_method('florist')),
  ('methods/redistribution', '(u * (sigma * mask)[:, None]) @ v',
   '(u * sigma[:, None]) @ v', _of_method('florist')),
  ('methods/redistribution', 'out[t], fold[t] = x, error()[t]',
   'out[t], fold[t] = x, 0 * error()[t]', _of_method('fedex')),
  ('methods/redistribution', 'Lora(whole.a[..., slots:], whole.b[:, slots:])', 'whole',
   'reference_test.py::test_what_does_not_fit_into_the_adapters_is_folded'),
  ('methods/redistribution', 'Redistributed(_emptied(server.adapters), deltas, {})',
   'Redistributed(server.adapters, deltas, {})', _IDENTITY),
  # Algebra.
  ('lora', 'Lora(x.a * ratio_a, x.b * ratio_b)', 'Lora(x.a * ratio_a, x.b)', _UNEQUAL),
  ('lora', 'leaf.astype(jnp.float32) + change[name]', 'leaf.astype(jnp.float32)',
   _of_method('full_finetuning')),
  ('lora', 'cumulative < share * cumulative', 'cumulative <= share * cumulative',
   _ENERGY),
  # The client's round.
  ('client', 'lora.rescale(adapters, 1 / ratio, rules.scale_carriers)', 'adapters',
   _UNEQUAL),
  ('client', 'scale=view.scale * ratio ** (power_a + power_b)', 'scale=view.scale',
   _of_method('raflora')),
  ('client', 'norm=lora.delta_norms(adapters, view.scale)',
   'norm=lora.delta_norms(adapters, 1.0)', _UNEQUAL),
  ('client', 'x._replace(**kept[t])', 'x', _of_method('local_only')),
  ('client', 'lambda x: client.share * x', 'lambda x: x',
   _of_method('full_finetuning')),
  ('client', 'adapters = lora.truncate(trained.adapters, mask)',
   'adapters = trained.adapters', _of_method('hetlora')),
  ('client', 'adapters=jax.tree.map(jnp.multiply, updates.adapters, live)',
   'adapters=updates.adapters', _of_method('ffa_lora')),
  ('client', 'lambda b, a: 1 - b + a', 'lambda b, a: 1 + 0 * b',
   _of_method('hetlora')),
  ('client', 'num_examples_C = jnp.where(reports_C, cohort.num_examples, 0)',
   'num_examples_C = cohort.num_examples', _DROPS_OUT),
  ('client', 'x * more, change)', 'x, change)', f'{_NOT_FINITE}[full_finetuning]'),
  # The server's step, and the round.
  ('server', 'shared = name not in rules.personal', 'shared = True',
   _of_method('local_only')),
  ('server', 'getattr(trained[t], name) * getattr(sent[t], name) * shared',
   'getattr(sent[t], name) * shared', f'{_UNTRAINED}[rolora-adam]'),
  ('server', 'lambda m, n, o: jnp.where(m > 0, n, o)', 'lambda m, n, o: n',
   f'{_UNTRAINED}[hetlora-momentum]'),
  ('server', 'lambda u, m: jnp.where(m > 0, u, 0)', 'lambda u, m: u',
   f'{_UNTRAINED}[hetlora-momentum]'),
  ('rounds', 'found.memory, cohort.client_id, reports_C)',
   'found.memory, cohort.client_id, cohort.num_examples > 0)', _DROPS_OUT),
  ('rounds', '  base = lora.fold(base, rules.wire.base_down(state.residual))\n', '',
   _of_method('full_finetuning')),
  ('rounds', 'lora.add(state.residual | stepped.change, new.fold)',
   'state.residual | stepped.change | new.fold', _of_method('flora')),
  ('rounds', '  reports_C &= found.finite\n', '', f'{_NOT_FINITE}[hetlora]'),
  # What is sent.
  ('methods/trainable', "lambda round: 'ba'[round % 2]",
   "lambda round: 'ab'[round % 2]", _BYTES),
  ('methods/distribution', 'return 0 * rank_CM + r_max', 'return rank_CM', _BYTES),
  ('methods/redistribution', 'rank_CM.sum(0) - rank_CM.max(0, initial=0)',
   'rank_CM.sum(0)', _STACKS),
  ('methods/traffic', "np.minimum(rank_M * _sizes(dims, 'ab', each), whole)", 'whole',
   _BYTES),
  # What the wire rounds.
  ('wire', 'else server + told', 'else start + told', _on_wire('hetlora')),
  ('wire', '(change + before) * mask', 'change + before',
   'wire_test.py::test_a_factor_that_rests_is_not_corrected'),
  ('wire', 'now if fresh else now - start', 'now - start', _on_wire('flora')),
  ('build', 'down=() if fresh else tuple(f for f in up if not known[f])', 'down=up',
   _on_wire('ffa_lora')),
  ('build', "up = tuple(f for f in 'ab' if f not in own)", "up = ('a', 'b')",
   _on_wire('fedsa_lora')),
  ('build', "None if 'pools data' in config.traits else kind.round", 'kind.round',
   _on_wire('centralized')),
  ('rounds', 'rules.wire.base_down(state.residual)', 'state.residual',
   _on_wire('full_finetuning')),
  ('client', '_prune(rules, exact.adapters', '_prune(rules, view.adapters',
   _on_wire('hetlora')),
  ('methods/redistribution', 'rest = on_wire(Lora(', 'rest = (Lora(',
   _on_wire('fedmomentum')),
  # How clients step.
  ('client', 'lambda x: count * x, grads', 'lambda x: 1.0 * x, grads',
   'knobs_test.py::test_batches_that_are_added_up_are_one[hetlora]'),
  ('optimizers', '[rise, fall], [warmup]', '[rise, fall], [0]',
   'knobs_test.py::test_rates_rise_and_fall_over_rounds'),
  ('optimizers', 'b=ratio * x.b', 'a=ratio * x.a',
   'knobs_test.py::test_steps_follow_the_schedules'),
  ('data/cohorts', '[: examples_of_epochs(available, f.local_epochs)]', '',
   'cohorts_test.py::test_epochs_pass_over_all_examples_in_other_orders'),
])  # fmt: skip


def _copy(folder: pathlib.Path) -> pathlib.Path:
  """Copies what the tests of the rules need."""
  for name in COPIED:
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
  shutil.copy(ROOT / 'pyproject.toml', folder)
  return folder


def _run(copy: pathlib.Path, programs: str, tests: Sequence[str]) -> tuple[int, str]:
  """Runs tests in a copy until one fails; returns pytest's exit code and last line."""
  done = subprocess.run(
    [
      sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider',
      *[f'tests/{test}' for test in tests],
    ],
    cwd=copy, capture_output=True, text=True, check=False,
    env=os.environ
    | {'JAX_COMPILATION_CACHE_DIR': programs, 'PYTHONDONTWRITEBYTECODE': '1'},
  )  # fmt: skip
  said = done.stdout.splitlines() or [done.stderr]
  return done.returncode, said[-1]


def _breaking(copy: pathlib.Path, mutation: Mutation) -> str:
  """Makes a mutation; returns the file's text as it was."""
  path = copy / 'hetlora_jax' / f'{mutation.file}.py'
  whole = path.read_text()
  if (found := whole.count(mutation.text)) != 1:
    raise ValueError(f'{path.name} has {mutation.text!r} {found} times, not once')
  path.write_text(whole.replace(mutation.text, mutation.broken))
  return whole


def main(words: Sequence[str] = ()) -> bool:
  """Tries the mutations, prints each, and returns whether all were noticed."""
  chosen = [m for m in MUTATIONS if all(word in ' '.join(m) for word in words)]
  if not chosen:
    raise ValueError(f'no mutation has {" and ".join(words)}')
  with tempfile.TemporaryDirectory() as name:
    folder, of_thread = pathlib.Path(name), threading.local()
    programs = str(folder / 'programs')

    def noticed(mutation: Mutation) -> bool:
      if not hasattr(of_thread, 'copy'):  # each thread has a copy of its own
        of_thread.copy = _copy(folder / str(threading.get_ident()))
      whole = _breaking(of_thread.copy, mutation)
      code, said = _run(of_thread.copy, programs, [mutation.test])
      (of_thread.copy / 'hetlora_jax' / f'{mutation.file}.py').write_text(whole)
      found = 'noticed' if code == FAILED else f'NOT NOTICED ({said})'
      text, broken = (t.strip() for t in (mutation.text, mutation.broken))
      print(f'{mutation.file}: {text} -> {broken or "(gone)"}: {found}', flush=True)
      return code == FAILED

    tests = sorted({mutation.test for mutation in chosen})
    code, said = _run(_copy(folder / 'whole'), programs, tests)
    if code:
      print(f'Without any mutation: {said}')
      return False
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      count = sum(pool.map(noticed, chosen))
  print(f'{count} of {len(chosen)} mutations were noticed')
  return count == len(chosen)


if __name__ == '__main__':
  sys.exit(not main(sys.argv[1:]))
