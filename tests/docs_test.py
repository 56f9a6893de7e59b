"""The documentation builds, and links lead somewhere."""

import importlib.util
import pathlib
import re

import pytest

from configs import default
from hetlora_jax import config
from hetlora_jax.methods import registry

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')]
MADE = ('api.md', 'api/', 'flags.md', 'methods.md', 'tutorial.md')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
  text = re.sub(r'(?s)```.*?```', '', page.read_text())
  for target in re.findall(r'\]\(([^)\s]+)\)', text):
    if target.startswith('https://') or target.startswith('#'):
      continue
    path = (page.parent / target.partition('#')[0]).resolve()
    made = str(path.relative_to(ROOT)).startswith(
      tuple(f'docs/{name}' for name in MADE)
    )
    assert made or path.exists(), f'{page.name} links to {target}'


def _hooks():
  if not importlib.util.find_spec('mkdocs'):
    pytest.skip('mkdocs is not installed; `make docs` installs it')
  from docs import hooks

  return hooks


def test_made_pages_have_every_method_rule_and_page():
  methods = _hooks().methods_page()
  for name, method in registry.METHODS.items():
    assert f'| `{name}` |' in methods
    assert method.citation.partition(',')[0] in methods
  for rules in registry.ROLES.values():
    assert all(f'| `{rule}`' in methods for rule in rules)
  assert set(_hooks().api_pages()) > {'api.md', 'api/hetlora_jax.lora.md'}


def test_fields_are_all_listed_with_their_defaults():
  lines = list(_hooks()._fields())
  values = config.flat(config.to_dict(config.resolve(default.get_config())))
  for name, value in values.items():
    assert any(f'| `{name}` | `{value!r}` |' in line for line in lines)


def test_pictures_are_xml():
  import xml.etree.ElementTree

  from docs import pictures

  for name in pictures.PICTURES:
    root = xml.etree.ElementTree.fromstring(pictures.draw(name))
    assert root.tag.endswith('svg'), name
    assert [x for x in root.iter() if x.tag.endswith('text')], name
