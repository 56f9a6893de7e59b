"""One row a published method: the names of its rules, and its source."""

from typing import NamedTuple


class Method(NamedTuple):
  """Rules by role; each is a key of the table of its role's module."""

  distribution: str
  objective: str
  pruning: str
  weighting: str
  aggregation: str
  redistribution: str
  citation: str


METHODS = {
  'hetlora': Method(
    distribution='prefix',
    objective='tail_penalty',
    pruning='norm_tail',
    weighting='norm',
    aggregation='factors',
    redistribution='keep',
    citation='Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432',
  ),
  'zero_pad': Method(
    distribution='prefix',
    objective='task',
    pruning='none',
    weighting='size',
    aggregation='factors',
    redistribution='keep',
    citation='zero-padding FedAvg, the baseline of arXiv 2401.06432',
  ),
}
