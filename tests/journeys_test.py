"""A paper's author, from a clean clone to an adapter in peft: see journeys.py."""

import pytest

from tests import journeys


@pytest.mark.slow  # installs, trains six runs and loads torch
def test_own_texts_become_a_table_and_an_adapter(tmp_path):
  found = journeys.journey(tmp_path, journeys.install(tmp_path))
  assert found['after'] < found['before'] - journeys.LEAST


def test_the_texts_are_of_thirty_unlike_clients(tmp_path):
  lines = journeys.write_data(tmp_path / 'mine.jsonl')
  count = {module: 0 for module in journeys.MODULES}
  for line in lines:
    count[line['client']] += 1
    assert line['context'] and line['target'].strip()
  assert len(count) == 30 and 4 <= min(count.values()) < max(count.values()) <= 40
