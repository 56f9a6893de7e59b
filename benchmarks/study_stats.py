"""What the study's results say: losses with intervals, paired gaps, verdicts.

Intervals are those of `hetlora_jax.tools.bootstrap`, over people and seeds together.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import study as runner
from configs import study
from hetlora_jax.tools import bootstrap
from hetlora_jax.tools.bootstrap import Interval

OURS = 'HetLoRA 0.99'
LOW, HIGH = 'LoRA r = 5', 'LoRA r = 50'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """An arm at its chosen rate: S seeds, E people that are reported."""

  name: str
  rate: float
  results: list[dict]  # of each seed

  def of_seed(self, i: int) -> 'Arm':
    return dataclasses.replace(self, results=[self.results[i]])

  def losses(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns everybody's loss [S, E] and tokens [E]; none that validate."""
    people = [reported(r['people'][kind], kind) for r in self.results]
    loss_SE = np.array([[p['loss_sum'] for p in seed] for seed in people])
    return loss_SE, np.array([p['tokens'] for p in people[0]])

  def curve(self, name: str) -> np.ndarray:
    """Returns a column of the curves, the mean over seeds: [evaluations]."""
    return np.mean([r['curve'][name] for r in self.results], axis=0)

  def rounds(self, name: str) -> np.ndarray:
    """Returns a number of every round, the mean over seeds: [rounds]."""
    return np.mean([r['rounds'][name] for r in self.results], axis=0)


def arms(results: dict[str, dict]) -> dict[str, Arm]:
  """Returns the arms of which all rates to try and all seeds have run."""
  out = {}
  for name in study.ARMS:
    rate = runner.best_rate(name, results)
    if rate is None:
      continue
    names = [runner.name_of(name, rate, seed) for seed in study.SEEDS]
    if all(n in results for n in names):
      seeds = [results[n] for n in names]
      out[name] = Arm(name=name, rate=rate, results=seeds)
  return out


def loss(arm: Arm, kind: str) -> float:
  loss_SE, tokens_E = arm.losses(kind)
  return float(loss_SE.mean(0).sum() / tokens_E.sum())


def gap(arm: Arm, other: Arm, kind: str) -> Interval:
  """Returns by how much one arm's loss lies above another's, in nats a token."""
  (loss_SE, tokens_E), (other_SE, _) = arm.losses(kind), other.losses(kind)
  return bootstrap.ratio(loss_SE - other_SE, tokens_E)


def target_loss(found: dict[str, Arm]) -> float:
  """Returns the loss to be reached, NaN if LOW, whose last it is, has not run."""
  return float(found[LOW].curve('seen')[-1]) if LOW in found else math.nan


def bytes_to(arm: Arm, target: float) -> float:
  """Returns the bytes sent both ways until a loss is reached, or infinity.

  Of people seen, interpolated between evaluations, the mean over seeds.
  """
  seen = arm.curve('seen')
  sent = arm.curve('up_bytes') + arm.curve('down_bytes')
  for i in range(1, len(seen)):
    if seen[i] <= target:
      share = (seen[i - 1] - target) / max(seen[i - 1] - seen[i], 1e-12)
      return float(sent[i - 1] + np.clip(share, 0, 1) * (sent[i] - sent[i - 1]))
  return math.inf


def reported(people: Sequence[dict], kind: str) -> list[dict]:
  """Leaves out those who chose rates."""
  return [
    p for p in people if kind != 'unseen' or not runner.for_validation(p['client'])
  ]


def verdict(gaps: Sequence[Interval]) -> str:
  """Says whether all gaps are significantly above 0, or one significantly below."""
  if all(g.low > 0 for g in gaps):
    return 'confirmed'
  if any(g.high < 0 for g in gaps):
    return 'not confirmed'
  return 'undecidable here'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What the paper says: the first arm's loss is above the second's."""

  text: str
  pairs: tuple[tuple[str, str], ...]


CLAIMS = (
  Claim(text='HetLoRA beats homogeneous LoRA of low rank', pairs=((LOW, OURS),)),
  Claim(
    text='HetLoRA beats homogeneous LoRA of high rank', pairs=((HIGH, OURS),)
  ),
  Claim(
    text='HetLoRA beats reconstruct-then-SVD', pairs=(('Recon+SVD', OURS),)
  ),
  Claim(
    text='full fine-tuning is the ceiling of HetLoRA',
    pairs=((OURS, 'full fine-tuning'),),
  ),
  Claim(
    text='self-pruning helps (gamma = 0.99 against none)',
    pairs=(('HetLoRA, no pruning', OURS),),
  ),
  Claim(
    text='gentle pruning is best (0.99 against 0.95 and 0.85)',
    pairs=(('HetLoRA 0.95', OURS), ('HetLoRA 0.85', OURS)),
  ),
  Claim(
    text='sparsity weights beat uniform and data-size weights',
    pairs=(
      ('HetLoRA, uniform weights', OURS), ('HetLoRA, size weights', OURS),
    ),
  ),
  Claim(
    text='a wide range of ranks (5 to 50) beats 5 to 20 and 20 to 50',
    pairs=(('HetLoRA, r = 5 to 20', OURS), ('HetLoRA, r = 20 to 50', OURS)),
  ),
)  # fmt: skip

# Not the paper's: arms whose clients are weighed alike; the last row, what wins.
_BY_SIZE = 'HetLoRA, size weights'
_BY_EXAMPLES = (
  LOW, HIGH, 'full fine-tuning', 'Recon+SVD',
  'raFLoRA', 'RBLA', 'FLoRA', 'FedEx', 'PreLort',
)  # fmt: skip
CONTROLS = (
  *(
    Claim(text=f'{arm}, both by examples', pairs=((arm, _BY_SIZE),))
    for arm in _BY_EXAMPLES
  ),
  Claim(
    text='LoRA r = 5, both uniform',
    pairs=(('LoRA r = 5, uniform weights', 'HetLoRA, uniform weights'),),
  ),
  Claim(
    text='HetLoRA, owners alike, both uniform',
    pairs=(('HetLoRA, owners alike', 'HetLoRA, uniform weights'),),
  ),
  Claim(
    text='LoRA r = 5, uniform, to HetLoRA from 5 to 20',
    pairs=(('LoRA r = 5, uniform weights', 'HetLoRA, r = 5 to 20'),),
  ),
)


def _gained_first(arm: Arm) -> float:
  return -float(arm.curve('seen')[1])


def _lost_again(arm: Arm) -> float:
  seen = arm.curve('seen')
  return float(seen[-1] - seen.min())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedClaim:
  """What the paper says of whole curves: a number is larger for `more`."""

  text: str
  more: str
  less: str
  number: Callable[[Arm, float], float]  # of an arm and the target


SEED_CLAIMS = (
  SeedClaim(
    text='low rank learns slowly (loss at the first evaluation, nats)',
    more=HIGH, less=LOW, number=lambda arm, target: _gained_first(arm),
  ),
  SeedClaim(
    text='high rank overfits (end above the best evaluation, nats)',
    more=HIGH, less=LOW, number=lambda arm, target: _lost_again(arm),
  ),
  SeedClaim(
    text='HetLoRA reaches the target with fewer bytes than high rank (MB)',
    more=HIGH, less=OURS, number=lambda arm, target: bytes_to(arm, target) / 1e6,
  ),
  SeedClaim(
    text='HetLoRA reaches the target with fewer bytes than Recon+SVD (MB)',
    more='Recon+SVD', less=OURS,
    number=lambda arm, target: bytes_to(arm, target) / 1e6,
  ),
)  # fmt: skip


def by_seed(claim: SeedClaim, found: dict[str, Arm]) -> list[float]:
  """Returns by how much the number is larger as claimed, in every seed."""
  more, less = found[claim.more], found[claim.less]
  target = target_loss(found)
  return [
    claim.number(more.of_seed(i), target) - claim.number(less.of_seed(i), target)
    for i in range(len(study.SEEDS))
  ]


def verdict_by_seed(values: Sequence[float]) -> str:
  """Says whether all seeds agree, and that they do not if one is NaN."""
  if all(x > 0 for x in values):
    return 'confirmed'
  return 'not confirmed' if all(x <= 0 for x in values) else 'undecidable here'
