"""Evaluates a run's newest checkpoint, or that of --round: python -m launch.evaluate.

With --generate it also completes held-out prompts, and writes generations.jsonl
and evaluation.json into --workdir.
"""

import json
import pathlib

from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, training
from hetlora_jax.run import Run
from hetlora_jax.tools import completions, scores
from launch import flags

_DEFAULT = completions.Settings()
GENERATE = absl_flags.DEFINE_enum(
  'generate', None, completions.SEARCHES, 'Complete held-out prompts, and how.'
)
ROUND = absl_flags.DEFINE_string(
  'round', 'newest', "Which state: 'newest', 'best' (eval.metric), or of this round."
)
EXAMPLES = absl_flags.DEFINE_integer(
  'examples_per_person', None, 'Examples of each; by default config.eval.', 1
)
OWN_RANK = absl_flags.DEFINE_bool(
  'own_rank', False, 'Give seen people the adapter cut to their own rank.'
)
BEAMS = absl_flags.DEFINE_integer('beams', _DEFAULT.beams, 'Beams of a beam search.')
ALPHA = absl_flags.DEFINE_float(
  'alpha', _DEFAULT.alpha, 'Beams are ranked by log p / length**alpha.'
)
MAX_TOKENS = absl_flags.DEFINE_integer(
  'max_tokens',
  _DEFAULT.max_tokens,
  'Of a completion; by default data.targets_per_example.',
)
SHOTS = absl_flags.DEFINE_integer(
  'shots', _DEFAULT.shots, 'Examples of other people put before each prompt.'
)
UNTOUCHED = absl_flags.DEFINE_bool(
  'untouched', False, 'Evaluate the base model, without a checkpoint.'
)


def _settings() -> completions.Settings:
  """Returns how to generate; raises ConfigError for its flags without --generate."""
  settings = completions.Settings(
    search=GENERATE.value or _DEFAULT.search,
    beams=BEAMS.value,
    alpha=ALPHA.value,
    max_tokens=MAX_TOKENS.value,
    shots=SHOTS.value,
    untouched=UNTOUCHED.value,
  )
  if not GENERATE.value and settings != _DEFAULT:
    raise config_lib.ConfigError(
      'beams, alpha, max_tokens, shots and untouched are for generating: add '
      '--generate=greedy or --generate=beam.'
    )
  return settings


def evaluate(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Prints the evaluation of a checkpoint, as JSON or a table."""
  settings = _settings()
  if EXAMPLES.value:
    config = config.replace(**{'eval.examples_per_person': EXAMPLES.value})
  if OWN_RANK.value:
    config = config.replace(**{'eval.own_rank': True})
  if not GENERATE.value:
    print(json.dumps(training.evaluate(Run(workdir), config, ROUND.value)))
    return
  found = completions.complete(Run(workdir), settings, config, ROUND.value)
  console.say(
    f'\n{scores.table(found)}\n\nResults are in {workdir}/evaluation.json '
    'and generations.jsonl'
  )


def main() -> None:
  """Starts the program, hetlora-evaluate too."""
  flags.run(evaluate)


if __name__ == '__main__':
  main()
